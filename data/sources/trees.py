"""Source trees as blocks: a file is a document."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from data.sources import blocks
from data.sources.blocks import Block, Fault, Position, Rejection, Row
from data.sources.discover import Source


def tree_blocks(source: Source, here: Position) -> Iterator[Block]:
    """Blocks of whole files from `here` on."""
    rows: list[Row] = []
    rejections: list[Rejection] = []
    size = done = 0
    for index in range(here.offset, len(source.files)):
        path = os.path.join(source.name, source.files[index]) if source.files[index] else source.name
        try:
            text = read_file(path)
            rows.append(Row(path, None, text))
            size += len(text)
        except Fault as fault:
            rejections.append(fault.of(path))
        if size >= blocks.BLOCK_BYTES or index + 1 == len(source.files):
            done += size
            after = Position(source=here.source, offset=index + 1)
            yield Block(name=source.name, after=after, done_bytes=done, rows=rows, rejections=rejections)
            rows, rejections, size = [], [], 0


def read_file(path: str) -> bytes:
    """The whole file. Raises Fault for what is none, cannot be read or is larger than MAX_LINE_BYTES."""
    try:
        if file_status(path).st_size > blocks.MAX_LINE_BYTES:
            raise Fault(f"file larger than {blocks.MAX_LINE_BYTES} bytes")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise Fault(blocks.CANNOT_BE_READ, error.strerror or "") from error


def file_status(path: str) -> os.stat_result:
    """Raises Fault for what is no file: a folder comes here only where it cannot be looked into (`discover.UNREADABLE`)."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise Fault("folder that cannot be looked into")
    if not stat.S_ISREG(status.st_mode):
        raise Fault("not a regular file")
    return status
