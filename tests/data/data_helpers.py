"""What the tests of the data stage share: running the command, reading shards with struct alone."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import xxhash
from support import ROOT
from tokenizers import Tokenizer

from data.sources.blocks import Block, Position, ReadOptions, Rejection
from data.sources.discover import Source
from data.sources.documents import read_documents as read_documents_of
from data.sources.read import read_blocks

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


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """A write beyond `size` bytes of a file fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_documents(folder: Path, split: str = "train") -> list[list[int]]:
    """The documents of a split, read with struct alone: independent of data/shards.py."""
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


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def changed(text: str, share: float, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10**9)}" if rng.random() < share else w for w in words(text))


def kept_and_removed(
    tmp_path: Path, preprocess: Any, tokenizer_file: Path, rows: list[dict[str, Any]], *flags: object
) -> tuple[list[str], dict]:
    """(texts that were kept, what the manifest says of the others) of the command on `rows`."""
    path = write_rows(tmp_path / "x.jsonl", rows)
    usual = ["--input", path, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--validation_fraction", 0]
    code, _, err = preprocess(*usual, *flags)
    assert code == 0, err
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return (
        [tokenizer.decode(d[:-1], skip_special_tokens=False) for d in read_documents(tmp_path / "out")],
        json.loads((tmp_path / "out" / "manifest.json").read_text())["documents"]["removed"],
    )


def overlaps(text: str, tasks: list[str]) -> bool:
    """Ten words in a row in common, six of them different names: every run compared with every run."""
    runs = {tuple(w[i : i + 10]) for w in map(words, tasks) for i in range(len(w) - 9)}
    w = words(text)
    shared = [run for run in (tuple(w[i : i + 10]) for i in range(len(w) - 9)) if run in runs]
    return any(len({name for name in run if len(name) > 1 and not name[0].isdigit()}) >= 6 for run in shared)


def change(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    start = at if at >= 0 else len(data) + at
    data[start : start + len(value)] = value
    path.write_bytes(data)


def blocks_of(path: Path, start: Position | None = None) -> list[Block]:
    return list(read_blocks([Source(kind="file", name=str(path), size=path.stat().st_size)], ReadOptions(), start))


def text_of(blocks: list[Block]) -> bytes:
    return b"".join(b.lines for b in blocks)


def compress(data: bytes, kind: str) -> bytes:
    if kind == "gz":
        return gzip.compress(data)
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True)) if kind == "zst" else data


def rejections_of(blocks: list[Block]) -> list[tuple[int | None, str]]:
    return [(r.line, r.reason) for b in blocks for r in b.rejections]


def read_file(path: Path, **options: Any) -> tuple[list[str], list[Rejection]]:
    """(texts of the documents, what was rejected) of one file, read as a worker reads it."""
    texts, rejections = [], []
    chosen = ReadOptions(**options)
    for block in read_blocks([Source(kind="file", name=str(path), size=path.stat().st_size)], chosen):
        rejections += block.rejections
        for found in read_documents_of(block, chosen.columns[0]):
            if isinstance(found, Rejection):
                rejections.append(found)
            else:
                texts.append(found.text)
    return texts, rejections


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"content": text}) + "\n" for text in texts).encode()


def zstd_frame(data: bytes, window_log: int = 20, checksum: bool = False) -> bytes:
    """A zstd frame of raw blocks, written out from RFC 8878."""
    frame = struct.pack("<IBB", 0xFD2FB528, checksum << 2, (window_log - 10) << 3)
    parts = [data[i : i + (1 << 17)] for i in range(0, len(data), 1 << 17)] or [b""]
    for number, part in enumerate(parts, 1):
        frame += struct.pack("<I", len(part) << 3 | (number == len(parts)))[:3] + part
    return frame + struct.pack("<Q", xxhash.xxh64_intdigest(data))[:4] * checksum


def skippable_frame(payload: bytes, number: int = 0) -> bytes:
    """A frame that holds no data, RFC 8878 section 3.1.2."""
    return struct.pack("<II", 0x184D2A50 + number, len(payload)) + payload
