"""Shards are cut where they are full; an open one is taken up where the state says, or refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from data_helpers import no_file_beyond

from data.cli import UserError
from data.pipeline.writer import SplitWriter
from data.shards import read_index


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_shard_is_closed_by_the_document_that_fills_it(tmp_path: Path, batch: int) -> None:
    sizes = np.array([4, 3, 5, 20, 1, 1, 8, 2, 10, 1], np.int32)
    tokens = np.arange(sizes.sum(), dtype=np.uint16)
    ends = np.cumsum(sizes)
    writer = SplitWriter(tmp_path, "uint16", 10)
    for at in range(0, len(sizes), batch):
        upto = min(at + batch, len(sizes))
        part = tokens[ends[at] - sizes[at] : ends[upto - 1]]
        writer.add(part, sizes[at:upto], sizes[at:upto].astype(np.int64) * 3)
    writer.close_shard()
    assert [s["tokens"] for s in writer.shards] == [12, 20, 10, 12, 1]
    assert [s["text_bytes"] for s in writer.shards] == [36, 60, 30, 36, 3]
    written = b"".join((tmp_path / f"{s['name']}.bin").read_bytes() for s in writer.shards)
    assert written == tokens.tobytes()
    found = [read_index(tmp_path / f"{s['name']}.idx").sizes.tolist() for s in writer.shards]
    assert found == [[4, 3, 5], [20], [1, 1, 8], [2, 10], [1]]


def begun(folder: Path) -> SplitWriter:
    """With an open shard of two documents: 8 tokens, 18 bytes of text."""
    writer = SplitWriter(folder, "uint16", 100)
    writer.add(np.arange(8, dtype=np.uint16), np.array([4, 4], np.int32), np.array([9, 9]))
    return writer


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def test_an_open_shard_is_taken_up_with_its_counts(tmp_path: Path) -> None:
    writer = begun(tmp_path)
    state = writer.state()
    writer.close()
    again = SplitWriter(tmp_path, "uint16", 100, state)
    again.close_shard()
    assert again.text_bytes == 18
    summary = again.summary()
    assert [summary[key] for key in ("documents", "tokens", "text_bytes")] == [2, 8, 18]


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may leave a name without the content that it was given to, and a content whose folder was not synced without
    its name."""
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (synced.append(Path(f"-> {Path(new).name}")), replace(old, new)))
    writer = begun(tmp_path)

    def done() -> list[str]:
        names = ["folder" if path == tmp_path else path.name if path.is_absolute() else str(path) for path in synced]
        synced.clear()
        return names

    writer.close_shard()
    contents = [".shard_000000.bin.tmp", ".shard_000000.sizes.tmp", "folder"]
    index = [".shard_000000.idx.tmp", "-> shard_000000.idx", "folder"]
    assert done() == [*contents, *index, "-> shard_000000.bin", "folder"]
    for names_are_new in (True, False):
        writer.add(np.arange(4, dtype=np.uint16), np.array([4], np.int32), np.array([9]))
        writer.state()
        assert done() == [".shard_000001.bin.tmp", ".shard_000001.sizes.tmp", *(["folder"] if names_are_new else [])]
    writer.close()


@pytest.mark.parametrize("suffix", ["bin", "sizes"])
def test_an_open_shard_that_lost_its_end_is_refused(suffix: str, tmp_path: Path) -> None:
    writer = begun(tmp_path)
    state = writer.state()
    writer.close()
    shorten(tmp_path / f".shard_000000.{suffix}.tmp")
    with pytest.raises(UserError, match=f"shard_000000.{suffix}.tmp is shorter than the job's state says"):
        SplitWriter(tmp_path, "uint16", 100, state)


def test_a_write_that_was_lost_is_named_before_the_shard_is_closed(tmp_path: Path) -> None:
    writer = begun(tmp_path)
    writer.state()
    shorten(tmp_path / ".shard_000000.bin.tmp")
    with pytest.raises(UserError, match="has 14 bytes instead of 16: a write was lost"):
        writer.close_shard()


def test_what_the_state_does_not_know_goes(tmp_path: Path) -> None:
    for name in ("shard_000000.bin", ".shard_000003.bin.tmp"):
        (tmp_path / name).touch()
    SplitWriter(tmp_path, "uint16", 100)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "room"), [("bin", 1000), ("sizes", 300_000)])
def test_a_full_disk_is_named_at_the_write(suffix: str, room: int, tmp_path: Path) -> None:
    writer, sizes = SplitWriter(tmp_path, "uint16", 1 << 20), np.ones(100_000, np.int32)
    with no_file_beyond(room), pytest.raises(OSError, match="File too large") as raised:
        writer.add(np.zeros(100_000, np.uint16), sizes, sizes)
    assert raised.value.filename == str(tmp_path / f".shard_000000.{suffix}.tmp")
    writer.close()
