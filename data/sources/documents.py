"""Blocks as documents: parse, check, count. Nothing a file can hold raises here; it gets a reason instead."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from data.sources.blocks import MISSING, Block, Fault, Rejection, Row, field_of
from data.sources.formats import bare_line, check_text

#: Why a text of nothing but white space is refused. A source tree has many such files, so no warning names them.
EMPTY = "empty text"
#: Besides white space, NUL and characters without width do not make a text either.
VISIBLE = re.compile("[^\\s\ufeff\u200b\u200c\u200d\u2060\x00]")


@dataclass(kw_only=True)
class Document:
    """`text` is str without lone surrogates; `row` holds the other fields (license, line_max, ...)."""

    name: str
    line: int | None
    text: str
    row: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """One document cannot be used: the kind of reason, under which it is counted, and what else there is to say of it."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.detail = detail


def read_documents(block: Block, text_field: str) -> Iterator[Document | Rejection]:
    """Every line, row or file of the block in order. Blank lines are passed over."""
    for row in read_rows(block, text_field):
        if isinstance(row, Rejection):
            yield row
            continue
        try:
            yield Document(name=row.name, line=row.line, text=_text(row.value, text_field), row=row.value)
        except Refused as reason:
            yield Rejection(row.name, row.line, str(reason), reason.detail)


def read_rows(block: Block, text_field: str = "content") -> Iterator[Row | Rejection]:
    """Every line, row or file of the block with a mapping as its value; a source file has only `text_field`."""
    for row in _rows(block):
        name, line, value = row
        if isinstance(value, dict):
            yield row
        elif not value.strip():
            if line is None:
                yield Rejection(name, line, EMPTY)
        else:
            try:
                yield Row(name, line, _fields(value, text_field, is_file=line is None))
            except Refused as reason:
                yield Rejection(name, line, str(reason))


def _rows(block: Block) -> Iterator[Row]:
    yield from block.rows
    start, line, lines = 0, block.first_line, block.lines
    if line == 1 and lines.startswith(b"\xef\xbb\xbf"):
        start = 3
    while start < len(lines):
        end = lines.find(b"\n", start)
        end = len(lines) if end < 0 else end
        yield Row(block.name, line, lines[start:end])
        start, line = end + 1, line + 1


def _fields(value: bytes, text_field: str, is_file: bool) -> dict[str, Any]:
    """A source file or a JSON line as one mapping."""
    if is_file:
        try:
            check_text(value[:1024])
            return {text_field: value.decode("utf-8-sig")}
        except UnicodeDecodeError:
            raise Refused("not UTF-8") from None
        except Fault as fault:
            raise Refused(fault.kind) from None
    row = parse_json(value)
    if not isinstance(row, dict):
        raise Refused("not a JSON object")
    return row


def parse_json(line: bytes) -> Any:
    """orjson; where it refuses, the standard library has the last word (NaN, huge integers), within its limits."""
    try:
        return orjson.loads(line)
    except ValueError:
        line = bare_line(line)
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise Refused("not UTF-8") from None
    except RecursionError:
        raise Refused("JSON nested too deeply") from None
    except ValueError as error:
        # A number of more than 4,300 digits is a plain ValueError.
        reason = "broken JSON" if isinstance(error, json.JSONDecodeError) else "JSON number too long"
        raise Refused(reason) from None


def _text(row: dict[str, Any], text_field: str) -> str:
    text = field_of(row, text_field)
    if text is MISSING:
        raise Refused(f"no field {text_field}", f"only {', '.join(list(row)[:8])}")
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            raise Refused("not UTF-8") from None
    if isinstance(text, Mapping):
        inside = ", ".join(f"{text_field}.{name}" for name in list(text)[:8])
        raise Refused(f"{text_field} is not a string", f"an object; --text_field takes {inside}" if inside else "an empty object")
    if not isinstance(text, str):
        raise Refused(f"{text_field} is not a string")
    if not VISIBLE.search(text):
        raise Refused(EMPTY)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise Refused("lone surrogate in text") from None
    return text


_ASCII_SPACE = bytes(b for b in range(128) if chr(b).isspace())


def content_key(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space only (CodeParrot's rule for duplicates)."""
    solid = text.encode().translate(None, _ASCII_SPACE) if text.isascii() else "".join(text.split()).encode()
    return hashlib.blake2b(solid, digest_size=16).digest()


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def split_document(text: str, max_bytes: int) -> list[str]:
    r"""The text in pieces of at most `max_bytes` UTF-8 bytes, cut after `\n`; empty where one line alone is longer.

    The tokenizers library takes 36 to 125 s and up to 7.7 GB for one document of 20 MB.
    """
    if len(text) * 4 <= max_bytes:
        return [text]
    data = text.encode()
    pieces, start = [], 0
    while len(data) - start > max_bytes:
        cut = data.rfind(b"\n", start, start + max_bytes) + 1
        if cut <= start:
            return []
        pieces.append(data[start:cut].decode())
        start = cut
    return [*pieces, data[start:].decode()] if start < len(data) else pieces
