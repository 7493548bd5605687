"""Streams become blocks of whole lines, whatever the file holds, and can be taken up at any block."""

from __future__ import annotations

import base64
import errno
import gzip
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_helpers import blocks_of, compress, text_of

from data.sources import blocks
from data.sources.blocks import Position
from data.sources.compressed import Damage
from data.sources.lines import Lines, cut_lines


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 300)
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 5000)


def random_lines(seed: int) -> bytes:
    rng = random.Random(seed)
    return b"{}\n" + b"\n".join(
        bytes(rng.choices(b'ab\r{"\x0b\xe2\x80\xa8', k=rng.choice((0, 1, 50, 700, 2500)))) for _ in range(60)
    )


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


def test_what_is_trusted_of_a_damaged_file_is_so_from_any_line_on(tmp_path: Path) -> None:
    first, second = (b"".join(b'{"content": "%d %d"}\n' % (k, i) for i in range(50)) for k in (1, 2))
    damaged = gzip.compress(second)[:-8] + bytes(8)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(first) + damaged)
    at = first.index(b"\n", 400) + 1
    start = Position(offset=at, line=first[:at].count(b"\n") + 1)
    assert text_of(blocks_of(tmp_path / "x.json.gz", start)) == first[at:]


def test_a_line_beyond_the_first_chunk_of_compressed_data_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream gives less than it is asked for."""
    monkeypatch.setattr("data.sources.compressed.CHUNK_BYTES", 300)
    rng = random.Random(0)
    lines = [b"{}\n", *(base64.b64encode(rng.randbytes(90)) + b"\n" for _ in range(20))]
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b"".join(lines)))
    assert text_of(blocks_of(tmp_path / "x.json.gz", Position(offset=sum(map(len, lines[:15])), line=16))) == b"".join(lines[15:])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("chunk", [1, 7, 300, 100_000])
def test_a_line_without_end_is_skipped_and_its_neighbours_are_kept(chunk: int) -> None:
    data = b"first\n" + b"x" * 20_000 + b"\nlast\n"
    chunks = (data[i : i + chunk] for i in range(0, len(data), chunk))
    found = list(cut_lines(chunks))
    kept = b"".join(lines.text for lines in found)
    lines = [line for line in kept.split(b"\n") if line and len(line) <= blocks.MAX_LINE_BYTES]
    assert lines == [b"first", b"last"]
    assert sum(lines.consumed for lines in found) == len(data) and sum(lines.count for lines in found) == 3
    assert [i for i, lines in enumerate(found) if not lines.text] == ([1] if chunk < 100_000 else [])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("longer", [0, 1, 299])
def test_a_line_is_skipped_for_its_length_wherever_reading_began(tmp_path: Path, longer: int) -> None:
    """Its newline comes with the chunk that makes it too long, or with the next; after a resume with the other."""
    path, found = tmp_path / "x.jsonl", set()
    for before in range(3, 303, 33):
        path.write_bytes(b"{}".ljust(before) + b"\n" + b"y" * (blocks.MAX_LINE_BYTES + longer) + b"\nlast\n")
        read = blocks_of(path)
        assert sum(block.lines.count(b"\n") + len(block.rejections) for block in read) == 3
        found.add(tuple((refused.line, refused.kind) for block in read for refused in block.rejections))
    assert found == ({((2, blocks.too_long()),)} if longer else {()})


@pytest.mark.parametrize("error", [Damage("it ends"), OSError(errno.EIO, "a bad sector")])
def test_whole_lines_before_the_stream_breaks_off_are_kept(error: Exception) -> None:
    def chunks() -> Iterator[bytes]:
        yield from (b"one\ntw", b"o\nthr")
        raise error

    found = cut_lines(chunks())
    assert next(found) == Lines(b"one\ntwo\n", 8, 2)
    with pytest.raises(type(error)):
        next(found)


def test_gigabytes_without_a_newline_take_little_memory() -> None:
    """The stream is 3 GB; the process may not grow by more than the longest line allowed and its copy."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunk = bytes(1 << 20)
    found = list(cut_lines(chunk for _ in range(3000)))
    assert found == [Lines(b"", 3000 << 20, 1)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
