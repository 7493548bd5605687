"""Compressed input: opened for streaming, and checked to its end before its first line is used.

A gzip, bzip2 or xz stream proves its content only with the checksum at its end. So each compressed file is decompressed once
without use (isal does some 500 MB/s of gzip) and only then read: of a damaged file exactly the members before the damage are kept,
never a guess. Memory is bounded whatever a file expands to: a stream never gives more than it is asked for.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, Protocol

from data.sources.blocks import CHUNK_BYTES, Fault
from data.sources.zstd_frames import frame_ends

#: An xz dictionary of `xz -9` takes 65 MiB; beyond this a file is called too large for us, not damaged.
XZ_MEMORY_BYTES = 256 << 20


class Damage(Exception):
    """The compressed data is not what its format allows, or ends early."""


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@contextmanager
def open_stream(path: str, compression: str | None, offset: int = 0) -> Iterator[tuple[Readable, IO[bytes]]]:
    """(stream of decompressed bytes from `offset` on, the file below it). Reading it raises Damage or Fault."""
    with open(path, "rb") as raw:
        if compression is None:
            raw.seek(offset)
            yield raw, raw
            return
        stream = _STREAMS[compression](raw)
        while offset > 0 and (skipped := len(stream.read(min(offset, CHUNK_BYTES)))):
            offset -= skipped
        yield stream, raw


class MemberStream:
    """Decompressed bytes of one or more members (gzip), streams (xz, bzip2), one behind the other.

    Unlike the standard library's files it never decompresses more than was asked for, so bytes before a damage can be had, and it
    knows how many of them stand in complete members (`sound`).
    """

    padding = b""  # what may stand between and behind members

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.data, self.position, self.sound = raw, b"", 0, 0
        self.member: Any = None
        self.members = 0

    def new_member(self) -> Any:
        raise NotImplementedError

    def decompress(self, data: bytes, size: int) -> bytes:
        """At most `size` bytes; leaves in `self.data` what the member has not taken."""
        raise NotImplementedError

    def read(self, size: int) -> bytes:
        """1 to `size` bytes, none at the end. Raises Damage."""
        while True:
            if self.member is None and not self._next_member():
                return b""
            if not self.data and self.wants_data():
                self.data = self.raw.read(CHUNK_BYTES)
                ended = not self.data
            else:
                ended = False
            out = self.decompress(self.data, size)
            self.position += len(out)
            if self.member.eof:
                self.data, self.member, self.sound = self.member.unused_data, None, self.position
                self.members += 1
            elif ended and not out:
                raise Damage("it ends inside a member")
            if out:
                return out

    def wants_data(self) -> bool:
        return True

    def _next_member(self) -> bool:
        """Begin the next one; False at the end of the file."""
        while True:
            self.data = self.data or self.raw.read(CHUNK_BYTES)
            if not self.data:
                return False
            if self.members and self.padding:
                self.data = self.data.lstrip(self.padding)
            if self.data:
                self.member = self.new_member()
                return True


class GzipStream(MemberStream):
    padding = b"\0"  # of tapes, as gzip allows

    def new_member(self) -> Any:
        from isal import isal_zlib

        return isal_zlib.decompressobj(31)

    def decompress(self, data: bytes, size: int) -> bytes:
        from isal import igzip_lib

        errors: Any = (igzip_lib.IsalError, zlib.error)
        try:
            out: bytes = self.member.decompress(data, size)
        except errors as error:
            raise Damage(str(error)) from error
        self.data = self.member.unconsumed_tail
        return out


class StandardStream(MemberStream):
    """Of a decompressor of the standard library, which keeps the input that it has not used."""

    def wants_data(self) -> bool:
        return bool(self.member.needs_input)

    def decompress(self, data: bytes, size: int) -> bytes:
        self.data = b""
        try:
            out: bytes = self.member.decompress(data, size)
        except (OSError, lzma.LZMAError) as error:
            if "Memory usage limit" in str(error):
                kind = f"xz data that needs more than {XZ_MEMORY_BYTES >> 20} MiB to be decompressed"
                raise Fault(kind, "compress it again with xz -9 or less") from error
            raise Damage(str(error)) from error
        return out


class Bzip2Stream(StandardStream):
    def new_member(self) -> Any:
        return bz2.BZ2Decompressor()


class XzStream(StandardStream):
    padding = b"\0"

    def new_member(self) -> Any:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)


class ZstdStream:
    """Arrow's decoder: several frames, skippable frames anywhere, windows of up to 128 MiB."""

    def __init__(self, raw: IO[bytes], part: tuple[int, int] | None = None) -> None:
        """`part`: (first byte, number of bytes) of the file, if not all."""
        import pyarrow

        self.raw, file = raw, pyarrow.PythonFile(raw, "r")
        self.stream = pyarrow.CompressedInputStream(file.get_stream(*part) if part else file, "zstd")

    def read(self, size: int) -> bytes:
        try:
            out: bytes = self.stream.read(size)
            return out
        except OSError as error:
            if error.errno is not None:  # the system's, not the decoder's
                raise
            if "too much memory" in str(error):
                raise Fault("zstd data with a window of more than 128 MiB", "compress it again without --long") from error
            if "ictionary" in str(error):
                raise Fault("zstd data that needs a dictionary", "compress it again without one") from error
            raise Damage(str(error)) from error

    @property
    def sound(self) -> int:
        """Bytes in whole frames. Of a damaged file, and reads it again: Arrow does not say where frames end."""
        begin = sound = 0
        for end in frame_ends(self.raw):
            frame = ZstdStream(self.raw, (begin, end - begin))
            try:
                sound += sum(map(len, iter(partial(frame.read, CHUNK_BYTES), b"")))
            except (Damage, Fault):
                break
            begin = end
        return sound


_STREAMS: dict[str, Any] = {"gzip": GzipStream, "bzip2": Bzip2Stream, "xz": XzStream, "zstd": ZstdStream}


def verified_bytes(path: str, compression: str | None) -> tuple[int | None, Fault | None]:
    """(None, None) for a sound file; else how many decompressed bytes can be trusted, and the fault."""
    if compression is None:
        return None, None
    with open_stream(path, compression) as (stream, _):
        try:
            while stream.read(CHUNK_BYTES):
                pass
            return None, None
        except Damage as error:
            trusted = stream.sound if isinstance(stream, (MemberStream, ZstdStream)) else 0
            kept = f"; the {trusted} bytes of whole members before the damage are kept" if trusted else ""
            return trusted, Fault(f"damaged {compression} data", f"{error}{kept}")
        except Fault as fault:  # beyond a limit: not damaged
            return 0, fault
