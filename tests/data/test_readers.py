"""Streams become blocks of whole lines, whatever the file holds, and can be taken up at any block."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pytest

from data import readers
from data.corpus import Source, find_sources
from data.readers import Block, Lines, Position, ReadOptions, cut_lines, read_blocks


def blocks_of(path: Path, start: Position | None = None) -> list[Block]:
    return list(read_blocks([Source(kind="file", name=str(path), size=path.stat().st_size)], ReadOptions(), start))


def text_of(blocks: list[Block]) -> bytes:
    return b"".join(b.lines for b in blocks)


def faults_of(blocks: list[Block]) -> list[tuple[int | None, str]]:
    return [(line, reason) for b in blocks for _, line, reason in b.faults]


def compress(data: bytes, kind: str) -> bytes:
    if kind == "gz":
        return gzip.compress(data)
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True)) if kind == "zst" else data


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 5000)


def random_lines(seed: int) -> bytes:
    rng = random.Random(seed)
    return b"\n".join(bytes(rng.choices(b'ab\r{"\x0b\xe2\x80\xa8', k=rng.choice((0, 1, 50, 700, 2500)))) for _ in range(60))


@pytest.mark.parametrize("kind", ["plain", "gz", "zst"])
@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_the_file_and_every_block_can_be_the_first(tmp_path: Path, kind: str, end: bytes) -> None:
    path = tmp_path / f"x.jsonl.{kind}"
    data = random_lines(len(end)) + end
    path.write_bytes(compress(data, kind))
    blocks = blocks_of(path)
    assert text_of(blocks) == data and len(blocks) > 10
    for i, block in enumerate(blocks[:-1]):
        rest = blocks_of(path, block.after)
        assert text_of(rest) == b"".join(b.lines for b in blocks[i + 1 :])
        if rest and rest[0].lines:
            assert rest[0].first_line == data[: len(data) - len(text_of(rest))].count(b"\n") + 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("chunk", [1, 7, 300, 100_000])
def test_a_line_without_end_is_skipped_and_its_neighbours_are_kept(chunk: int) -> None:
    data = b"first\n" + b"x" * 20_000 + b"\nlast\n"
    chunks = (data[i : i + chunk] for i in range(0, len(data), chunk))
    found = list(cut_lines(chunks, 1))
    kept = b"".join(lines.text for lines, _ in found)
    lines = [line for line in kept.split(b"\n") if line and len(line) <= readers.MAX_LINE_BYTES]
    assert lines == [b"first", b"last"]
    assert sum(lines.consumed for lines, _ in found) == len(data) and sum(lines.count for lines, _ in found) == 3
    assert [n for _, faults in found for n, _ in faults] == ([2] if chunk < 100_000 else [])


def test_gigabytes_without_a_newline_take_little_memory() -> None:
    """The stream is 3 GB; the process may not grow by more than the longest line allowed and its copy."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunk = bytes(1 << 20)
    found = list(cut_lines((chunk for _ in range(3000)), 1))
    assert found == [(Lines(b"", 3000 << 20, 1), [(1, readers.too_long())])]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_gzip_members_before_the_damage_are_kept_and_no_others(tmp_path: Path) -> None:
    members = [gzip.compress(f'{{"content": "document {i}"}}\n'.encode() * 50) for i in range(3)]
    path = tmp_path / "x.json.gz"
    for name, data, kept in [
        ("sound", b"".join(members), 150),
        ("cut in the third", b"".join(members)[:-5], 100),
        ("cut in the only one", members[0][:-5], 0),
        ("checksum of the second", members[0] + members[1][:-8] + b"\0\0\0\0" + members[1][-4:] + members[2], 50),
        ("a bit of the second", members[0] + members[1][:30] + bytes([members[1][30] ^ 1]) + members[1][31:] + members[2], 50),
        ("something else behind it", members[0] + b"garbage that is no gzip", 50),
    ]:
        path.write_bytes(data)
        blocks = blocks_of(path)
        assert text_of(blocks).count(b"\n") == kept, name
        faults = faults_of(blocks)
        assert ([] if name == "sound" else [(None, True)]) == [(line, "damaged gzip" in reason) for line, reason in faults], name


def test_damaged_zstd_is_named_and_not_used(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(compress(b'{"content": "x"}\n' * 1000, "zst")[:-3])
    blocks = blocks_of(path)
    assert text_of(blocks) == b"" and "damaged zstd" in faults_of(blocks)[0][1]


def test_zstd_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(compress(b"one\n", "zst") + compress(b"two\n", "zst"))
    assert text_of(blocks_of(path)) == b"one\ntwo\n"


@pytest.mark.parametrize("name", ["x.json.gz", "x.jsonl.zst", "x.json"])
def test_the_first_bytes_decide_not_the_extension(tmp_path: Path, name: str) -> None:
    line = json.dumps({"content": "x"}).encode() + b"\n"
    for data in (line, compress(line, "gz"), compress(line, "zst")):
        (tmp_path / name).write_bytes(data)
        assert text_of(blocks_of(tmp_path / name)) == line


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
    reasons = {Path(name).name: reason for b in blocks for name, _, reason in b.faults}
    assert reasons == {
        "empty.jsonl": "empty file",
        "fifo.jsonl": "not a regular file",
        "gone.jsonl": "cannot be read: No such file or directory",
        "secret.jsonl": "cannot be read: Permission denied",
    }
