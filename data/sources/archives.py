"""tar archives as blocks: a member is read as a file of its name would be.

The reader is ours and not the standard library's, which takes a header's word for how much memory it may use, and stops silently at
the end mark where `cat a.tar b.tar` goes on. Nothing is extracted under a member's name.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from data.files import naming
from data.sources import blocks
from data.sources.blocks import Block, Fault, Position, ReadOptions, Row
from data.sources.compressed import Damage, Readable, open_stream, verified_bytes
from data.sources.discover import ALL_DATA_SUFFIXES, DATA_SUFFIXES, SKIPPED_FOLDERS, Source, describe_endings, is_source
from data.sources.formats import HEAD_BYTES, check_lines, check_named, compression, is_tar, tar_checksum_is_right
from data.sources.lines import text_blocks

#: Headers that hold names: longer ones are an attack.
MAX_HEADER_BYTES = 1 << 20
#: A compressed file or a table inside an archive is copied out of it, to a disk (or a memory) that is not ours to fill.
MAX_COPY_BYTES = 4 << 30
_UNIT = 512
_REGULAR = (b"0", b"\0", b"7")
#: Links, devices, folders and FIFOs: a size in such a header is another file's or a hint, and no content follows it.
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")

ReadFile = Callable[[Source, Position, ReadOptions], Iterator[Block]]


@dataclass
class Member:
    """A regular file of an archive; `stream` stands at its first byte and must be at its last before the next is asked for."""

    name: str
    size: int
    stream: Readable
    sparse: bool = False

    def __post_init__(self) -> None:
        self.left = self.size

    def read(self, size: int) -> bytes:
        """1 to `size` bytes, none at the member's end. Raises Damage where the archive ends first."""
        if not self.left:
            return b""
        data = self.stream.read(min(size, self.left))
        if not data:
            raise Damage(f"it ends inside {self.name}")
        self.left -= len(data)
        return data

    def skip(self) -> None:
        while self.read(blocks.CHUNK_BYTES):
            pass


def members(stream: Readable) -> Iterator[Member]:
    """All regular files, behind an end mark too. Raises Damage."""
    named: dict[str, str] = {}  # what extended headers say of the next member
    ended = False
    while header := _read(stream, _UNIT):
        ended = not header.strip(b"\0")
        if ended:
            continue
        if not tar_checksum_is_right(header):
            raise Damage("the checksum of a member's header is wrong")
        kind, size = header[156:157], _number(header[124:136])
        size = _number_of(named["size"]) if "size" in named and kind in _REGULAR else size
        size = 0 if kind in _WITHOUT_CONTENT else size
        if kind in (b"x", b"L"):
            named |= _extended(kind, _read(stream, size, limit=MAX_HEADER_BYTES))
            _padding(stream, size)
            continue
        if kind == b"S":
            _skip_holes(stream, header[482:483])
        name = named.get("GNU.sparse.name") or named.get("path") or _name(header)
        member = Member(name, size, stream, sparse=kind == b"S" or any(key.startswith("GNU.sparse") for key in named))
        if (kind in _REGULAR and not name.endswith("/")) or member.sparse:
            yield member
        if kind != b"g":
            named = {}
        member.skip()
        _padding(stream, size)
    if not ended:
        raise Damage("it has no end mark, so something is missing")


def _read(stream: Readable, size: int, limit: int | None = None) -> bytes:
    """Exactly `size` bytes, or none at the end."""
    if limit is not None and size > limit:
        raise Damage(f"a header of {size} bytes")
    data = b""
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    if data and len(data) < size:
        raise Damage("it ends inside a header")
    return data


def _skip_holes(stream: Readable, more: bytes) -> None:
    """Of GNU's own sparse files the blocks that say where further holes are, before the content. `more`: whether there is one."""
    while more.strip(b"\0"):
        block = _read(stream, _UNIT)
        if not block:
            raise Damage("it ends inside a header")
        more = block[504:505]


def _padding(stream: Readable, size: int) -> None:
    _read(stream, -size % _UNIT)


def _number(field: bytes) -> int:
    """Octal digits, or since GNU tar a binary number behind a first byte of 0x80."""
    if field[0] == 0x80:
        return _number_of(str(int.from_bytes(field[1:], "big")))
    return _number_of(field.strip(b" \0").decode("ascii", "replace") or "0", 8)


def _number_of(text: str, base: int = 10) -> int:
    try:
        number = int(text, base)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 63:
        raise Damage(f"a member of {text[:30]!r} bytes")
    return number


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """A GNU long name, or the records `LENGTH key=value\\n` of a pax header."""
    if kind == b"L":
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found = {}
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        end = _number_of(length.decode("ascii", "replace"))
        key, equal, value = data[len(length) + 1 : end - 1].partition(b"=")
        if not equal or end <= len(length):
            raise Damage("a broken pax header")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[end:]
    return found


class Limited:
    """The first `limit` bytes of a stream: what is behind them is damaged."""

    def __init__(self, stream: Readable, limit: int | None) -> None:
        self.stream, self.left = stream, limit

    def read(self, size: int) -> bytes:
        if self.left is None:
            return self.stream.read(size)
        data = self.stream.read(min(size, self.left)) if self.left else b""
        self.left -= len(data)
        return data


def tar_blocks(source: Source, here: Position, how: str | None, options: ReadOptions, read_file: ReadFile) -> Iterator[Block]:
    """Blocks from `here` on: `offset` is the member's number, `inner` the position in it. Raises Fault for what is damaged."""
    limit, fault = verified_bytes(source.at, how) if options.verify else (None, None)
    try:
        if limit == 0 and fault is not None:
            raise fault
        suffixes, note = _wanted_suffixes(source, how, limit, options)
        with open_stream(source.at, how) as (stream, raw):
            wanted = (
                (index, member)
                for index, member in enumerate(members(Limited(stream, limit)))
                if index >= here.offset and _is_worth(member.name) and member.name.endswith(suffixes)
            )
            if suffixes == options.suffixes:
                found = _code_blocks(here, source.name, wanted)
            else:
                found = _data_blocks(here, source.name, wanted, options, read_file)
            for block in found:
                block.done_bytes = min(raw.tell(), max(source.size, 0))
                block.note, note = note, ""
                yield block
    except Damage as error:
        raise fault or Fault("damaged tar archive", f"{error}; what is before that is kept") from error
    if fault is not None:
        raise fault


def _wanted_suffixes(source: Source, how: str | None, limit: int | None, options: ReadOptions) -> tuple[tuple[str, ...], str]:
    """(endings of the members that are read, what to say of the others). As in a folder source files or data files, never both.

    Raises Fault.
    """
    names: list[str] = []
    with open_stream(source.at, how) as (stream, _), contextlib.suppress(Damage):  # said when it is read
        for member in members(Limited(stream, limit)):
            names += [member.name] if _is_worth(member.name) else []
    code = [name for name in names if is_source(name, options.suffixes)]
    data = [name for name in names if name.endswith(DATA_SUFFIXES) and not is_source(name, options.suffixes)]
    if code and data:
        raise Fault("tar archive of source files and data files", f"{code[0]} and {data[0]}: unpack it and name one kind of them")
    if not code and not any(name.endswith(ALL_DATA_SUFFIXES) for name in names):
        endings = " ".join((*ALL_DATA_SUFFIXES, *options.suffixes))
        raise Fault("tar archive without a file to read", f"none of its {len(names)} files ends in one of {endings}")
    chosen = options.suffixes if code else ALL_DATA_SUFFIXES
    others = [name for name in names if not name.endswith(chosen)]
    hint = "; --suffixes names the endings of source files" if code else ""
    return chosen, f"{source.name}: {describe_endings(others)} left out{hint}" if others else ""


def _is_worth(name: str) -> bool:
    """No cache, package folder, or metadata that macOS adds for each file."""
    parts = name.split("/")
    return not parts[-1].startswith("._") and not SKIPPED_FOLDERS.intersection(parts)


def _code_blocks(here: Position, name: str, wanted: Iterator[tuple[int, Member]]) -> Iterator[Block]:
    """Source files, many to a block."""
    block, size = Block(name=name, after=here, done_bytes=0), 0
    try:
        for index, member in wanted:
            own = f"{name}/{member.name}"
            try:
                _check_member(member, blocks.MAX_LINE_BYTES)
                block.rows.append(Row(own, None, _read(member, member.size)))
                size += member.size
            except Fault as fault:
                block.rejections.append(fault.of(own))
            block.after = Position(source=here.source, offset=index + 1)
            if size >= blocks.BLOCK_BYTES:
                yield block
                block, size = Block(name=name, after=block.after, done_bytes=0), 0
    except Damage:
        yield block  # the members before it
        raise
    yield block


def _data_blocks(
    here: Position, name: str, wanted: Iterator[tuple[int, Member]], options: ReadOptions, read_file: ReadFile
) -> Iterator[Block]:
    """Data files: text as it streams by, what must be checked to its end or read from its end from a copy."""
    for index, member in wanted:
        start = here if index == here.offset else Position(source=here.source, offset=index)
        inside = Position(source=here.source, offset=start.inner, line=start.line)
        own = f"{name}/{member.name}"
        last = Block(name=own, after=Position(source=here.source, offset=index + 1), done_bytes=0)
        try:
            _check_member(member)
            head = _beginning(member)
            stream = Prefixed(head, member)
            if compression(head) or is_tar(head) or head.startswith(b"PAR1"):
                found = _copied_blocks(stream, member, own, inside, options, read_file)
            else:
                found = _text_blocks(stream, member, own, inside)
            for block in found:
                inside = block.after
                block.after = replace(start, inner=inside.offset, line=inside.line)
                yield block
        except Damage as error:
            kept = f" behind line {inside.line - 1}" if inside.line > 1 else ""
            raise Damage(f"{error}{kept}") from error
        except Fault as fault:
            last.rejections.append(fault.of(own))
        yield last


def _beginning(member: Member) -> bytes:
    """Its first bytes; fewer where the archive ends among them, which reading on then says. Raises Damage where it has none."""
    head = b""
    try:
        while len(head) < HEAD_BYTES and (more := member.read(HEAD_BYTES - len(head))):
            head += more
    except Damage:
        if not head:
            raise
    return head


def _text_blocks(stream: Prefixed, member: Member, name: str, here: Position) -> Iterator[Block]:
    if not stream.head:
        raise Fault("empty file")
    if name.endswith(".parquet"):
        check_named(stream.head)
        raise Fault("not a Parquet file")
    check_lines(stream.head, complete=not member.left)
    passed = here.offset
    while passed > 0 and (skipped := len(stream.read(min(passed, blocks.CHUNK_BYTES)))):
        passed -= skipped
    return text_blocks(stream, name, here)


def _copied_blocks(
    stream: Prefixed, member: Member, name: str, here: Position, options: ReadOptions, read_file: ReadFile
) -> Iterator[Block]:
    _check_member(member, MAX_COPY_BYTES)
    with tempfile.TemporaryFile(buffering=0) as file:  # without a name: a kill leaves nothing of it behind
        while data := stream.read(blocks.CHUNK_BYTES):
            with naming(tempfile.gettempdir()):
                while data:  # a disk that is nearly full takes a part
                    data = data[file.write(data) :]
        yield from read_file(Source(kind="file", name=name, size=member.size, path=f"/proc/self/fd/{file.fileno()}"), here, options)


class Prefixed:
    """A member whose first bytes were looked at."""

    def __init__(self, head: bytes, member: Member) -> None:
        self.head, self.rest, self.member = head, head, member

    def read(self, size: int) -> bytes:
        if not self.rest:
            return self.member.read(size)
        data, self.rest = self.rest[:size], self.rest[size:]
        return data


def _check_member(member: Member, limit: int | None = None) -> None:
    if member.sparse:
        raise Fault("sparse file in a tar archive, which is not read", "unpack it")
    if limit is not None and member.size > limit:
        raise Fault(f"file larger than {limit} bytes in a tar archive", "unpack it")
