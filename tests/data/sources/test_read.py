"""Files that are none, and files of another kind than their name says."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from data_helpers import blocks_of, compress, rejections_of, text_of

from data.sources.blocks import ReadOptions
from data.sources.discover import find_sources
from data.sources.read import read_blocks


@pytest.mark.parametrize("name", ["x.json.gz", "x.jsonl.zst", "x.json"])
def test_the_first_bytes_decide_not_the_extension(tmp_path: Path, name: str) -> None:
    line = json.dumps({"content": "x"}).encode() + b"\n"
    for data in (line, compress(line, "gz"), compress(line, "zst")):
        (tmp_path / name).write_bytes(data)
        assert text_of(blocks_of(tmp_path / name)) == line


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz", "zst"])
def test_what_the_system_refuses_is_no_damage(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's decoder raises an OSError for both."""
    text = b"".join(json.dumps({"content": os.urandom(300).hex()}).encode() + b"\n" for _ in range(5000))
    (tmp_path / "x.jsonl").write_bytes(compress(text, kind) if kind else text)

    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() > 200_000:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(buffer)

    monkeypatch.setattr("data.sources.compressed.open", lambda path, *_, **__: io.BufferedReader(Failing(path)), raising=False)
    assert (tmp_path / "x.jsonl").stat().st_size > 1_000_000
    assert rejections_of(blocks_of(tmp_path / "x.jsonl")) == [(None, "cannot be read (Input/output error)")]


def test_what_is_no_readable_file_is_a_fault_and_the_next_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "secret.jsonl").write_bytes(b"secret\n")
    (tmp_path / "sound.jsonl").write_bytes(b"sound\n")
    # The tests may run as root, whom no permission stops.
    real = open

    def guarded(path: object, *args: object, **kwargs: object) -> object:
        if str(path).endswith("secret.jsonl"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", guarded)
    blocks = list(read_blocks(find_sources([f"{tmp_path}/*.jsonl"]), ReadOptions()))
    assert text_of(blocks) == b"sound\n"
    reasons = {Path(r.name).name: r.reason for b in blocks for r in b.rejections}
    assert reasons == {
        "empty.jsonl": "empty file",
        "fifo.jsonl": "not a regular file",
        "gone.jsonl": "cannot be read (No such file or directory)",
        "secret.jsonl": "cannot be read (Permission denied)",
    }
