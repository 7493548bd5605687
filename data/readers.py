"""Sources as blocks: a few MiB of whole lines or rows each, the unit of work of a worker.

Only the reader holds state: a block says where the next one starts, so a job can go on there. Memory is bounded by BLOCK_BYTES and
MAX_LINE_BYTES, whatever a file holds. How a stream is cut into blocks has no effect on the output.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.compressed import Fault, open_stream, verified_bytes
from data.corpus import Source

BLOCK_BYTES = 2 << 20
CHUNK_BYTES = 1 << 20
#: A JSON line of a document of --max_document_bytes can be 6 times as long (\\u0000); this also caps one file of a source tree.
MAX_LINE_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where the next block starts: `offset` in decompressed bytes (JSON Lines), rows (Parquet, hub) or files (tree)."""

    source: int = 0
    offset: int = 0
    line: int = 1


@dataclass(kw_only=True)
class Block:
    """`lines` of JSON (bytes) or `rows` of (name, line, value); `faults` are what the reader itself had to refuse."""

    name: str
    after: Position
    done_bytes: int  # of the whole input, as it lies on disk; for progress only
    first_line: int = 1
    lines: bytes = b""
    rows: list[tuple[str, int | None, Any]] = field(default_factory=list)
    faults: list[tuple[str, int | None, str]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What the readers need from the command line."""

    columns: tuple[str, ...] = ("content",)
    hub_split: str = "train"
    verify: bool = True  # decompress a file once to its end before its first line is used


def read_blocks(sources: Sequence[Source], options: ReadOptions, start: Position | None = None) -> Iterator[Block]:
    """All blocks from `start` on, in order. A fault of a whole source is a block with only that fault."""
    start = start or Position()
    before = sum(max(s.size, 0) for s in sources[: start.source])
    for number in range(start.source, len(sources)):
        source = sources[number]
        here = start if number == start.source else Position(source=number)
        end = Position(source=number + 1)
        try:
            for block in _read_source(source, number, here, options):
                block.done_bytes += before
                yield block
            yield Block(name=source.name, after=end, done_bytes=before + max(source.size, 0))
        except Fault as fault:
            done = before + max(source.size, 0)
            yield Block(name=source.name, after=end, done_bytes=done, faults=[(source.name, None, str(fault))])
        before += max(source.size, 0)


def _read_source(source: Source, number: int, here: Position, options: ReadOptions) -> Iterator[Block]:
    if source.kind == "tree":
        return _tree_blocks(source, number, here)
    if source.kind == "hub":
        from data.tables import hub_blocks

        return hub_blocks(source, number, here, options)
    kind = sniff(source.name)
    if kind == "parquet":
        from data.tables import parquet_blocks

        return parquet_blocks(source, number, here, options)
    return _line_blocks(source, number, here, kind, options.verify)


def sniff(path: str) -> str:
    """`gzip`, `zstd`, `parquet` or `plain` by the first bytes: an extension may lie. Raises Fault for what is no file of data."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Fault("not a regular file")
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise Fault(f"cannot be read: {error.strerror}") from error
    if not head:
        raise Fault("empty file")
    if head == b"PAR1":
        return "parquet"
    if path.endswith(".parquet"):
        raise Fault("not a Parquet file")
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "zstd" if head == b"\x28\xb5\x2f\xfd" else "plain"


def _line_blocks(source: Source, number: int, here: Position, kind: str, verify: bool) -> Iterator[Block]:
    """JSON Lines, plain or compressed. Of a damaged file the part whose checksum is right is kept, and the fault is reported."""
    offset, line = here.offset, here.line
    try:
        limit, fault = verified_bytes(source.name, kind) if verify else (None, None)
        with open_stream(source.name, kind, offset) as (stream, raw):
            for data, faults in cut_lines(_chunks(stream, limit - offset if limit is not None else None), line):
                first, consumed = line, data.consumed
                offset, line = offset + consumed, line + data.count
                done = min(raw.tell(), source.size)
                yield Block(
                    name=source.name,
                    after=Position(source=number, offset=offset, line=line),
                    done_bytes=done,
                    first_line=first,
                    lines=data.text,
                    faults=[(source.name, n, reason) for n, reason in faults],
                )
    except (OSError, EOFError, zlib.error) as error:  # unverified, or changed under our hands
        raise Fault(f"cannot be read: {error}") from error
    if fault is not None:
        raise fault


def _chunks(stream: Any, limit: int | None) -> Iterator[bytes]:
    while limit is None or limit > 0:
        chunk = stream.read(CHUNK_BYTES if limit is None else min(CHUNK_BYTES, limit))
        if not chunk:
            return
        if limit is not None:
            limit -= len(chunk)
        yield chunk


@dataclass(frozen=True)
class Lines:
    """`text`: whole lines; `consumed` bytes and `count` lines of the stream stand behind it (more than `text` after a skip)."""

    text: bytes
    consumed: int
    count: int


def cut_lines(chunks: Iterator[bytes], line: int) -> Iterator[tuple[Lines, list[tuple[int, str]]]]:
    r"""Cut a stream at `\n` (never at U+2028 or \r) into texts of about BLOCK_BYTES; lines beyond MAX_LINE_BYTES are skipped."""
    buffer = bytearray()
    dropped = 0  # bytes of an over-long line already thrown away; 0 where we are not inside one
    faults: list[tuple[int, str]] = []
    for chunk in chunks:
        if dropped:
            end = chunk.find(b"\n") + 1
            dropped += end or len(chunk)
            if not end:
                continue
            yield Lines(b"", dropped, 1), [(line, too_long())]
            line, dropped, chunk = line + 1, 0, chunk[end:]
        known = len(buffer)
        buffer += chunk
        if len(buffer) < BLOCK_BYTES:
            continue
        cut = buffer.rfind(b"\n", known) + 1 or buffer.rfind(b"\n", 0, known) + 1
        if cut:
            text = bytes(memoryview(buffer)[:cut])
            del buffer[:cut]
            count = text.count(b"\n")
            yield Lines(text, cut, count), faults
            line += count
        elif len(buffer) > MAX_LINE_BYTES:
            dropped = len(buffer)
            buffer.clear()
    if dropped:
        yield Lines(b"", dropped, 1), [(line, too_long())]
    elif buffer:
        text = bytes(buffer)
        yield Lines(text, len(text), text.count(b"\n") + (not text.endswith(b"\n"))), faults


def too_long() -> str:
    return f"line longer than {MAX_LINE_BYTES} bytes"


def _tree_blocks(source: Source, number: int, here: Position) -> Iterator[Block]:
    rows: list[tuple[str, int | None, Any]] = []
    faults: list[tuple[str, int | None, str]] = []
    size = done = 0
    for index in range(here.offset, len(source.files)):
        path = os.path.join(source.name, source.files[index]) if source.files[index] else source.name
        try:
            text = _read_file(path)
            rows.append((path, None, text))
            size += len(text)
        except Fault as fault:
            faults.append((path, None, str(fault)))
        if size >= BLOCK_BYTES or index + 1 == len(source.files):
            done += size
            after = Position(source=number, offset=index + 1)
            yield Block(name=source.name, after=after, done_bytes=done, rows=rows, faults=faults)
            rows, faults, size = [], [], 0


def _read_file(path: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Fault("not a regular file")
        if status.st_size > MAX_LINE_BYTES:
            raise Fault(f"file larger than {MAX_LINE_BYTES} bytes")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise Fault(f"cannot be read: {error.strerror}") from error
