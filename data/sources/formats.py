"""What a file is, by its first bytes: read, or refused by the name of its format with what to do. A file's name may lie.

Sources of the magic numbers: each format's specification (RFC 8878 for zstd and its skippable frames, RFC 1952 for gzip, the .xz
and bzip2 formats, POSIX ustar), and for the rest the table of file(1).
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import orjson

from data.pointers import pointer
from data.sources.blocks import Fault

#: What is looked at: longer than most first lines, and not more than a reader holds anyway.
HEAD_BYTES = 1 << 20
#: So many first lines without one JSON object are not broken lines but another kind of file.
OTHER_LINES = 20

BOM = b"\xef\xbb\xbf"

COMPRESSIONS = ((b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"))
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")


class NotRead(NamedTuple):
    """A format that is not read: its first bytes (from `offset` on), its name, and what to do about it."""

    magic: bytes
    name: str
    remedy: str
    offset: int = 0


_UNPACK = "unpack it and name the files inside"
_DECOMPRESS = "decompress it, or compress it with gzip, zstd, xz or bzip2"
_TO_PARQUET = "convert it to Parquet or JSON Lines"
_BINARY = "it holds no text to train on"
NOT_READ = (
    NotRead(b"PK\x03\x04", "zip archive", _UNPACK),
    NotRead(b"PK\x05\x06", "zip archive", _UNPACK),
    NotRead(b"PK\x07\x08", "zip archive", _UNPACK),
    NotRead(b"7z\xbc\xaf\x27\x1c", "7z archive", _UNPACK),
    NotRead(b"Rar!\x1a\x07", "RAR archive", _UNPACK),
    NotRead(b"MSCF", "cabinet archive", _UNPACK),
    NotRead(b"xar!", "xar archive", _UNPACK),
    NotRead(b"!<arch>\n", "ar archive", _UNPACK),
    NotRead(b"070701", "cpio archive", _UNPACK),
    NotRead(b"070702", "cpio archive", _UNPACK),
    NotRead(b"070707", "cpio archive", _UNPACK),
    NotRead(b"\xc7\x71", "cpio archive", _UNPACK),
    NotRead(b"\xed\xab\xee\xdb", "RPM package", _UNPACK),
    NotRead(b"LZIP", "lzip data", _DECOMPRESS),
    NotRead(b"LRZI", "lrzip data", _DECOMPRESS),
    NotRead(b"\x89LZO\x00\r\n\x1a\n", "lzop data", _DECOMPRESS),
    NotRead(b"\x04\x22\x4d\x18", "LZ4 data", _DECOMPRESS),
    NotRead(b"\x02\x21\x4c\x18", "LZ4 data", _DECOMPRESS),
    NotRead(b"\xff\x06\x00\x00sNaPpY", "Snappy data", _DECOMPRESS),
    NotRead(b"\x1f\x9d", "compress (.Z) data", _DECOMPRESS),
    NotRead(b"\x1f\xa0", "compress (.Z) data", _DECOMPRESS),
    NotRead(b"\x1f\x1e", "pack data", _DECOMPRESS),
    NotRead(b"\x5d\x00\x00", "LZMA data of the old .lzma format", _DECOMPRESS),
    NotRead(b"\x78\x01", "zlib data", _DECOMPRESS),
    NotRead(b"\x78\x9c", "zlib data", _DECOMPRESS),
    NotRead(b"\x78\xda", "zlib data", _DECOMPRESS),
    NotRead(b"\x37\xa4\x30\xec", "zstd dictionary", "give the data, not the dictionary"),
    *(
        NotRead(bytes([version, 0xB5, 0x2F, 0xFD]), "zstd data of a version before 0.8", _DECOMPRESS)
        for version in range(0x22, 0x28)
    ),
    NotRead(b"\xfd\x2f\xb5\x1e", "zstd data of a version before 0.8", _DECOMPRESS),
    NotRead(b"PARE", "Parquet file with an encrypted footer", "write it without encryption"),
    NotRead(b"ARROW1", "Arrow IPC (Feather) file", _TO_PARQUET),
    NotRead(b"FEA1", "Feather file", _TO_PARQUET),
    NotRead(b"\xff\xff\xff\xff", "Arrow IPC stream", _TO_PARQUET),
    NotRead(b"Obj\x01", "Avro file", _TO_PARQUET),
    NotRead(b"ORC", "ORC file", _TO_PARQUET),
    NotRead(b"\x89HDF\r\n\x1a\n", "HDF5 file", _TO_PARQUET),
    NotRead(b"SQLite format 3\x00", "SQLite database", _TO_PARQUET),
    NotRead(b"DUCK", "DuckDB database", _TO_PARQUET, 8),
    NotRead(b"\x93NUMPY", "NumPy array", _TO_PARQUET),
    *(NotRead(bytes([0x80, protocol]), "pickle", f"pickles are never loaded; {_TO_PARQUET}") for protocol in range(2, 6)),
    NotRead(b"MMIDIDX\x00\x00", "Megatron index", "give text, not tokens"),
    NotRead(b"%PDF-", "PDF document", "extract its text"),
    NotRead(b"\x7fELF", "ELF program", _BINARY),
    NotRead(b"\x89PNG\r\n\x1a\n", "PNG image", _BINARY),
    NotRead(b"\xff\xd8\xff", "JPEG image", _BINARY),
    NotRead(b"GIF8", "GIF image", _BINARY),
    NotRead(b"\xca\xfe\xba\xbe", "Java class or Mach-O program", _BINARY),
    NotRead(b"\x00asm", "WebAssembly program", _BINARY),
    NotRead(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Microsoft Office document", "extract its text"),
)


def compression(head: bytes) -> str | None:
    """`gzip`, `zstd`, `bzip2` or `xz` by the first bytes, None for anything else."""
    if _ZSTD_SKIPPABLE.match(head):
        return "zstd"
    if head.startswith(b"BZh"):
        # A digit, then the magic of a block or of the end of an empty stream: three letters alone could begin a text.
        return "bzip2" if head[3:4].isdigit() and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90") else None
    return next((name for magic, name in COMPRESSIONS if head.startswith(magic)), None)


def is_tar(head: bytes) -> bool:
    """A tar header: POSIX and GNU write `ustar`; the oldest have only a right checksum."""
    if len(head) < 512:
        return False
    return head[257:262] == b"ustar" or (head[0] != 0 and tar_checksum_is_right(head[:512]))


def tar_checksum_is_right(header: bytes) -> bool:
    """The sum of a header's bytes with the checksum field as spaces, unsigned or, of some old writers, signed."""
    try:
        written = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    rest = header[:148] + b" " * 8 + header[156:]
    return written in (sum(rest), sum(b - 256 if b > 127 else b for b in rest))


def check_named(head: bytes) -> None:
    """Raises Fault for a format that is known and not read."""
    for known in NOT_READ:
        # Only what cannot be JSON is looked into beyond its first bytes.
        if head.startswith(known.magic, known.offset) and not (known.offset and head.startswith((b"{", b"["))):
            raise Fault(f"{known.name}, which is not read", known.remedy)
    if head[7:9] == b"\x00{" and b'"data_offsets"' in head:
        raise Fault("safetensors file, which is not read", _BINARY)
    check_text(head)


def check_text(head: bytes) -> None:
    """Raises Fault for a pointer in place of a file, and for text that is not UTF-8 from its first characters on."""
    if stands_for := pointer(head):
        raise Fault(f"{stands_for.name}, which is not read", stands_for.remedy)
    wide = _wide_encoding(head)
    if wide:
        raise Fault(f"{wide} text, which is not read", f"convert it: iconv -f {wide} -t UTF-8")


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by its byte order mark, or by the zeros that ASCII has there."""
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    zeros = "".join("0" if byte == 0 else "x" for byte in head[:4])
    return {"x000": "UTF-32LE", "000x": "UTF-32BE", "x0x0": "UTF-16LE", "0x0x": "UTF-16BE"}.get(zeros)


def check_lines(head: bytes, *, complete: bool) -> None:
    """Raises Fault where the beginning of a text (all of it if `complete`) is not that of JSON Lines.

    One line that is an object in itself is enough: what is broken beside it is then counted line by line.
    """
    text = head.removeprefix(BOM).lstrip(b" \t\r\n")
    if complete and not text:
        raise Fault("empty file")
    line, _, rest = text.partition(b"\n")
    if _is_object(line.strip()):
        return
    check_named(head)
    lines = [line for line in text.split(b"\n") if line.strip()]
    if any(map(_is_object, lines)) and not _opens_array(line, lines) and not text[:9].lower().startswith(_PAGES):
        return
    if text.startswith(b"<"):
        remedy = "most likely a server's error page in place of the file: download it again"
        raise Fault("HTML or XML page, which is not read", remedy)
    if text.startswith(b"["):
        _check_array(line, rest)
    if text.startswith(b"{"):
        _check_object(text)
    whole = lines if complete else lines[:-1]
    if len(whole) >= OTHER_LINES:
        binary = b"\x00" in head[:4096]
        what = "binary data of no kind that is known here" if binary else f"none of its first {len(whole)} lines is a JSON object"
        raise Fault("not JSON Lines", f"{what}; give JSON Lines or Parquet, or tree:FOLDER for source files")
    if b"\x00" in head[:512]:
        raise Fault("not JSON Lines", "binary data of no kind that is known here")


def bare_line(line: bytes) -> bytes:
    """Without the byte order mark that files put together have inside, and the separator of JSON text sequences (RFC 7464)."""
    return line.removeprefix(b"\x1e").removeprefix(BOM)


def _is_object(line: bytes) -> bool:
    """A JSON object from the first column on: inside JSON that is spread over lines they are indented."""
    line = bare_line(line)
    if not line.startswith(b"{"):
        return False
    try:
        orjson.loads(line)
        return True
    except ValueError:
        return _json_object(line)


def _json_object(line: bytes) -> bool:
    """With the standard library, which takes NaN and large numbers (and, given bytes, UTF-16, which we do not)."""
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


#: How a page begins; a cut line of text may begin with another `<`.
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")


def _opens_array(line: bytes, lines: list[bytes]) -> bool:
    """An array over lines breaks its first one off at `[`, `{` or `,`, or has lines that are a comma, and may have its last object
    alone on a line. What `split -b` or a log leaves of a first line begins with a bracket at times, and breaks off at none of
    these."""
    return line.startswith(b"[") and (line.rstrip().endswith((b"[", b"{", b",")) or b"," in map(bytes.strip, lines))


def _check_array(line: bytes, rest: bytes) -> None:
    """`[1, 2]` can be a (useless) line of its own among others; anything else that begins with a bracket is one array."""
    try:
        alone = bool(rest.strip()) and isinstance(json.loads(line.decode()), list)
    except (ValueError, RecursionError):
        alone = False
    if not alone:
        raise Fault("JSON array, which is not read", "JSON Lines has one object a line: jq -c '.[]' FILE > FILE.jsonl")


def _check_object(text: bytes) -> None:
    """The first line is no object although it begins as one: is the object spread over lines, or are several on one line?"""
    first = text.partition(b"\n")[0].strip()
    decoded = text[: HEAD_BYTES // 4].decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder().raw_decode(decoded)
    except (ValueError, RecursionError):
        end = -1
    if first == b"{" or (end > 0 and "\n" in decoded[:end]):
        raise Fault("JSON over several lines, which is not read", "JSON Lines has one object a line: jq -c . FILE > FILE.jsonl")
    behind = decoded[end:].lstrip(" \t") if end > 0 else ""
    if behind.lstrip("\r").startswith("{"):
        apart = "carriage returns" if behind.startswith("\r") else "nothing"
        remedy = "JSON Lines has one object a line, ended by a newline: jq -c . FILE > FILE.jsonl"
        raise Fault(f"JSON objects with {apart} between them, which is not read", remedy)
