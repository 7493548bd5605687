"""JSON Lines, plain or compressed, as blocks of whole lines. BLOCK_BYTES and MAX_LINE_BYTES bound the memory for any file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from data.sources import blocks
from data.sources.blocks import Block, Fault, Position, ReadOptions, Rejection
from data.sources.compressed import Damage, Readable, open_stream, verified_bytes
from data.sources.discover import Source


def line_blocks(source: Source, here: Position, compression: str | None, options: ReadOptions) -> Iterator[Block]:
    """Blocks from `here` on. Of a damaged file the part whose checksum is right is kept, then the Fault is raised."""
    try:
        limit, fault = verified_bytes(source.at, compression) if options.verify else (None, None)
        with open_stream(source.at, compression, here.offset) as (stream, raw):
            for block in text_blocks(stream, source.name, here, limit - here.offset if limit is not None else None):
                block.done_bytes = min(raw.tell(), source.size)
                yield block
    except OSError as error:
        raise Fault(blocks.CANNOT_BE_READ, error.strerror or str(error)) from error
    except Damage as error:  # unverified, or changed under our hands
        raise Fault(f"damaged {compression} data", str(error)) from error
    if fault is not None:
        raise fault


def text_blocks(stream: Readable, name: str, here: Position, limit: int | None = None) -> Iterator[Block]:
    """A stream that stands at `here.offset` as blocks of whole lines."""
    offset, line = here.offset, here.line
    for lines in cut_lines(_chunks(stream, limit)):
        first = line
        offset, line = offset + lines.consumed, line + lines.count
        yield Block(
            name=name,
            after=replace(here, offset=offset, line=line),
            done_bytes=0,
            first_line=first,
            lines=lines.text,
            rejections=[] if lines.text else [Rejection(name, first, blocks.too_long())],
        )


def _chunks(stream: Readable, limit: int | None) -> Iterator[bytes]:
    while limit is None or limit > 0:
        chunk = stream.read(blocks.CHUNK_BYTES if limit is None else min(blocks.CHUNK_BYTES, limit))
        if not chunk:
            return
        if limit is not None:
            limit -= len(chunk)
        yield chunk


@dataclass(frozen=True)
class Lines:
    """`text`: whole lines, empty where one line was skipped for its length; `consumed` bytes and `count` lines of the stream."""

    text: bytes
    consumed: int
    count: int


def cut_lines(chunks: Iterator[bytes]) -> Iterator[Lines]:
    r"""Cut a stream at `\n` (never at U+2028 or \r) into texts of about BLOCK_BYTES; a line beyond MAX_LINE_BYTES is skipped.

    The buffer is in one of two states. Usually it holds the beginning of the next text and grows by whole chunks until there is
    enough to cut at its last newline. Where it has outgrown MAX_LINE_BYTES without a newline, it is thrown away, and from then
    on bytes are only counted (`dropped`) until the newline that ends the long line.

    Where the stream breaks off (Damage, OSError), the whole lines before come first: how many are kept must not depend on where
    reading began.
    """
    buffer = bytearray()
    dropped = 0
    try:
        for chunk in chunks:
            if dropped:
                end = chunk.find(b"\n") + 1
                dropped += end or len(chunk)
                if not end:
                    continue
                yield Lines(b"", dropped, 1)
                dropped, chunk = 0, chunk[end:]
            known = len(buffer)
            buffer += chunk
            if len(buffer) < blocks.BLOCK_BYTES:
                continue
            # Look in the new chunk first: in what was there before, a newline can only stand if this is the first time we cut.
            cut = buffer.rfind(b"\n", known) + 1 or buffer.rfind(b"\n", 0, known) + 1
            if cut:
                yield from _taken(buffer, cut)
            elif len(buffer) > blocks.MAX_LINE_BYTES:
                dropped = len(buffer)
                buffer.clear()
    except (Damage, OSError):
        if cut := buffer.rfind(b"\n") + 1:
            yield from _taken(buffer, cut)
        raise
    if dropped:
        yield Lines(b"", dropped, 1)
    elif buffer:
        text = bytes(buffer)
        yield Lines(text, len(text), text.count(b"\n") + (not text.endswith(b"\n")))


def _taken(buffer: bytearray, size: int) -> Iterator[Lines]:
    """The first bytes of the buffer, which end with a newline. They are no longer in it.

    A first line that is too long is skipped here as well: whether the chunk that took the buffer beyond MAX_LINE_BYTES held the
    line's end depends on where reading began. No other line is longer than a chunk and a block.
    """
    first = buffer.find(b"\n") + 1
    if first - 1 > blocks.MAX_LINE_BYTES:
        del buffer[:first]
        yield Lines(b"", first, 1)
        size -= first
    if size:
        # Through a memoryview, which copies the text once; it must be gone before the buffer may shrink.
        text = bytes(memoryview(buffer)[:size])
        del buffer[:size]
        yield Lines(text, size, text.count(b"\n"))
