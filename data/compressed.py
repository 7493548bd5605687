"""Compressed input: opened for streaming, and checked to its end before its first line is used.

A gzip stream proves its content only with the checksum at its end. So each compressed file is decompressed once without use
(isal does some 500 MB/s) and only then read: of a damaged file exactly the members before the damage are kept, never a guess.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

CHUNK_BYTES = 1 << 20


class Fault(Exception):
    """A whole source cannot be used, or not beyond a point: the reason, without the name."""


@contextmanager
def open_stream(path: str, kind: str, offset: int = 0) -> Iterator[tuple[Any, IO[bytes]]]:
    """(stream of decompressed bytes from `offset` on, the file below it). Only plain files can seek to it."""
    with open(path, "rb") as raw:
        stream = _decompress(raw, kind)
        if kind == "plain":
            raw.seek(offset)
        else:
            while offset > 0 and (skipped := len(stream.read(min(offset, CHUNK_BYTES)))):
                offset -= skipped
        yield stream, raw


def _decompress(raw: IO[bytes], kind: str) -> Any:
    if kind == "gzip":
        return GzipStream(raw)
    if kind == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return raw


class GzipStream:
    """Decompressed bytes of one or more gzip members. Unlike GzipFile it never decompresses more than was asked for, so bytes
    before a damage can be had, and it knows how many of them stand in complete members (`sound`).
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.data, self.position, self.sound = raw, b"", 0, 0
        self.member: Any = None

    def read(self, size: int) -> bytes:
        """1 to `size` bytes, none at the end. Raises EOFError or zlib.error for damage."""
        from isal import igzip_lib, isal_zlib

        damage: Any = igzip_lib.IsalError  # which is no zlib.error
        while True:
            self.data = self.data or self.raw.read(CHUNK_BYTES)
            if self.member is None:
                self.data = self.data.lstrip(b"\0") if self.position else self.data  # padding of tapes, as gzip allows
                if not self.data:
                    more = self.raw.read(CHUNK_BYTES)
                    if not more:
                        return b""
                    self.data = more
                    continue
                self.member = isal_zlib.decompressobj(31)
            ended = not self.data
            try:
                out: bytes = self.member.decompress(self.data, size)
            except damage as error:
                raise zlib.error(str(error)) from error
            self.data = self.member.unconsumed_tail
            self.position += len(out)
            if self.member.eof:
                self.data, self.member, self.sound = self.member.unused_data, None, self.position
            elif ended and not out:
                raise EOFError("it ends inside a member")
            if out:
                return out


def verified_bytes(path: str, kind: str) -> tuple[int | None, Fault | None]:
    """(None, None) for a sound file; else how many decompressed bytes can be trusted, and the fault."""
    if kind == "plain":
        return None, None
    with open_stream(path, kind) as (stream, _):
        try:
            while stream.read(CHUNK_BYTES):
                pass
            return None, None
        except (OSError, EOFError, zlib.error, ValueError) as error:
            trusted = stream.sound if isinstance(stream, GzipStream) else 0
            kept = f"; the {trusted} bytes before the damage have a right checksum and are kept" if trusted else ""
            return trusted, Fault(f"damaged {kind} data ({error}){kept}")
