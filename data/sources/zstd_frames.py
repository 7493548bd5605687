"""Where the frames of a zstd file end, by their headers alone (RFC 8878, section 3.1): nothing is decompressed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO

FRAME, SKIPPABLE = 0xFD2FB528, 0x184D2A50  # of the latter the last four bits are free
RLE, RESERVED = 1, 3


def frame_ends(raw: IO[bytes]) -> Iterator[int]:
    """Offsets behind each whole frame, from the file's beginning up to what is no frame or is not there to its end."""
    size, at = raw.seek(0, os.SEEK_END), 0
    while (end := _frame_end(raw, at)) and end <= size:
        yield end
        at = end


def _frame_end(raw: IO[bytes], at: int) -> int:
    """0 where no frame begins, or it breaks off between two blocks."""
    raw.seek(at)
    start = raw.read(8)
    magic = int.from_bytes(start[:4], "little")
    if len(start) == 8 and magic & ~0xF == SKIPPABLE:
        return at + 8 + int.from_bytes(start[4:], "little")
    if len(start) < 8 or magic != FRAME:
        return 0
    flags = start[4]
    is_one_segment = flags >> 5 & 1
    content_size = (is_one_segment, 2, 4, 8)[flags >> 6]
    block = at + 5 + (not is_one_segment) + (0, 1, 2, 4)[flags & 3] + content_size
    while True:
        raw.seek(block)
        if len(header := raw.read(3)) < 3:
            return 0
        number = int.from_bytes(header, "little")
        is_last, kind, length = number & 1, number >> 1 & 3, number >> 3
        if kind == RESERVED:
            return 0
        block += 3 + (1 if kind == RLE else length)
        if is_last:
            return block + 4 * (flags >> 2 & 1)  # a checksum
