"""Maps follow the process's limit of open files, and give way when somebody else needs them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import environment
from support import ROOT

from data import stream
from data.pipeline.writer import SplitWriter
from data.shards import SPLITS
from data.stream import TokenStream


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, sound_shards: Path) -> Path:
    """150 shards of one document each."""
    folder = tmp_path_factory.mktemp("many")
    manifest = json.loads((sound_shards / "manifest.json").read_text())
    for split in SPLITS:
        writer = SplitWriter(folder / split, "uint16", 1)
        for number in range(150):
            writer.add(np.array([number + 1, number + 2, 0], np.uint16), np.array([3], np.int32), np.array([9]))
        manifest["splits"][split] = writer.summary()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("limit", [40, 64, 128])
def test_few_file_handles_are_enough(limit: int, many: Path) -> None:
    """Three streams over the same shards, documents looked up as well, while others hold half of the handles."""
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
        "import sys, numpy as np; from pathlib import Path\n"
        "from data.stream import TokenStream\n"
        f"taken = [open('/dev/null') for _ in range({limit // 2})]\n"
        "streams = [TokenStream(Path(sys.argv[1]), 'train') for _ in range(3)]\n"
        "assert len(streams[0].shards) == 150\n"
        "for s in streams * 2:\n"
        "    out = np.empty(s.tokens, s.dtype); s.read(0, out)\n"
        "    assert len(s.document_starts(0, s.tokens)) == s.manifest['splits']['train']['documents']\n"
        "print(int(out.sum(dtype=np.int64)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(many)], capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    whole = [np.fromfile(path, np.uint16).sum(dtype=np.int64) for path in (many / "train").glob("*.bin")]
    assert int(done.stdout) == sum(whole)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_all_maps_are_given_up_before_it_fails(number: int, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (TokenStream(many, "train") for _ in range(2))
    one.read(0, np.empty(one.tokens, one.dtype))
    assert len(one._maps) > 5
    real, failures = two._map, [1]

    def scarce(shard: int) -> np.ndarray:
        if failures[0]:
            failures[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(shard)

    monkeypatch.setattr(two, "_map", scarce)
    assert len(two._tokens(0)) and not one._maps and not failures[0]
    failures[0] = 2
    with pytest.raises(OSError, match="oo many open files"):
        two._tokens(1)


def test_the_limit_is_shared_by_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_streams", [object()] * 8)
    monkeypatch.setattr(stream.resource, "getrlimit", lambda _: (1024, 4096))
    assert stream.open_limit() == 32
    monkeypatch.setattr(stream.resource, "getrlimit", lambda _: (stream.resource.RLIM_INFINITY, 0))
    assert stream.open_limit() == stream.OPEN_SHARDS
    monkeypatch.setattr(stream.resource, "getrlimit", lambda _: (8, 8))
    assert stream.open_limit() == 1
