"""All sources as one sequence of blocks: a few MiB of whole lines or rows each.

Only the reader holds state: a block says where the next one starts, so a job can go on there. How a stream is cut into blocks has
no effect on the output.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data.sources.archives import tar_blocks
from data.sources.blocks import CANNOT_BE_READ, Block, Fault, Position, ReadOptions
from data.sources.compressed import Damage, open_stream
from data.sources.discover import Source
from data.sources.formats import HEAD_BYTES, check_lines, check_named, compression, is_tar
from data.sources.lines import line_blocks
from data.sources.parquet import parquet_blocks
from data.sources.tables import hub_blocks
from data.sources.trees import file_status, tree_blocks


def read_blocks(sources: Sequence[Source], options: ReadOptions, start: Position | None = None) -> Iterator[Block]:
    """All blocks from `start` on, in order. A fault of a whole source is a block with only that rejection."""
    start = start or Position()
    before = sum(max(s.size, 0) for s in sources[: start.source])
    for number in range(start.source, len(sources)):
        source = sources[number]
        here = start if number == start.source else Position(source=number)
        last = Block(name=source.name, after=Position(source=number + 1), done_bytes=before + max(source.size, 0))
        try:
            for block in _read_source(source, here, options):
                block.done_bytes += before
                yield block
        except Fault as fault:
            last.rejections.append(fault.of(source.name))
        yield last
        before += max(source.size, 0)


def _read_source(source: Source, here: Position, options: ReadOptions) -> Iterator[Block]:
    if source.kind == "tree":
        return tree_blocks(source, here)
    if source.kind == "hub":
        return hub_blocks(source, here, options)
    return _file_blocks(source, here, options)


def _file_blocks(source: Source, here: Position, options: ReadOptions) -> Iterator[Block]:
    """A file on disk, or of an archive, by its first bytes."""
    compression, content = sniff(source.at, source.name)
    if content == "parquet":
        return parquet_blocks(source, here, options)
    if content == "lines":
        return line_blocks(source, here, compression, options)
    if source.path:
        raise Fault("archive inside an archive, which is not read", "unpack it")
    return tar_blocks(source, here, compression, options, _file_blocks)


class Kind(NamedTuple):
    """`compression`: gzip, zstd, bzip2, xz or None; `content` below it: lines, parquet or tar."""

    compression: str | None
    content: str


def sniff(path: str, name: str) -> Kind:
    """What the file at `path` is, by its first bytes: `name` may lie. Raises Fault for what is not read."""
    try:
        file_status(path)
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(max(os.fstat(file.fileno()).st_size - 4, 0))
            tail = file.read(4)
        how = compression(head)
        text, complete = (head, len(head) < HEAD_BYTES) if how is None else _beginning(path, how)
    except OSError as error:
        raise Fault(CANNOT_BE_READ, error.strerror or "") from error
    if not head:
        raise Fault("empty file")
    if text.startswith(b"PAR1"):
        if how:
            raise Fault(f"Parquet file inside {how} data, which is not read", "decompress it; Parquet is compressed in itself")
        return Kind(None, "parquet")
    if how and compression(text):
        raise Fault("data that was compressed twice, which is not read", "decompress it once")
    if is_tar(text):
        return Kind(how, "tar")
    if tail == b"LANC":
        raise Fault("Lance file, which is not read", "convert it to Parquet or JSON Lines")
    if (name or path).endswith(".parquet"):
        check_named(text)
        raise Fault("not a Parquet file")
    check_lines(text, complete=complete)
    return Kind(how, "lines")


def _beginning(path: str, how: str) -> tuple[bytes, bool]:
    """(the first decompressed bytes, whether they are all); fewer where the file is damaged, which the reader finds and names."""
    text = b""
    with open_stream(path, how) as (stream, _), contextlib.suppress(Damage):
        while len(text) < HEAD_BYTES:
            more = stream.read(HEAD_BYTES - len(text))
            if not more:
                return text, True
            text += more
    return text, False
