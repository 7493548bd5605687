"""What the tests of the data stage share: running the command, reading shards with struct alone."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def shared_data(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    """JSON Lines, gzipped where the name says so."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
    return path


def command(*arguments: object, script: str = "data/preprocess.py") -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments: object, script: str = "data/preprocess.py", prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a person starts it."""
    line = [*prefix, *command(*arguments, script=script)]
    return subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=240, cwd=ROOT)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_documents(folder: Path, split: str = "train") -> list[list[int]]:
    """The documents of a split, read with struct alone, from what DESIGN.md says of the format: independent of data/shards.py."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found = []
    for shard in manifest["splits"][split]["shards"]:
        index = (folder / split / f"{shard['name']}.idx").read_bytes()
        assert index[:9] == b"MMIDIDX\x00\x00"
        version, code, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
        assert version == 1 and documents == sequences + 1
        letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
        sizes = struct.unpack_from(f"<{sequences}i", index, 34)
        offsets = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
        bounds = struct.unpack_from(f"<{sequences + 1}q", index, 34 + 12 * sequences)
        assert bounds == tuple(range(sequences + 1)) and len(index) == 34 + 20 * sequences + 8
        data = (folder / split / f"{shard['name']}.bin").read_bytes()
        assert len(data) == width * sum(sizes)
        found += [list(struct.unpack_from(f"<{n}{letter}", data, o)) for n, o in zip(sizes, offsets, strict=True)]
    return found
