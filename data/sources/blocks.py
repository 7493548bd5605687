"""The words that readers and workers share: a block of lines or rows, where the next one starts, and what was refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BLOCK_BYTES = 2 << 20
CHUNK_BYTES = 1 << 20
#: A JSON line of a document of --max_document_bytes can be 6 times as long (\\u0000); this also caps one file of a source tree.
MAX_LINE_BYTES = 32 << 20
#: What the system refused, whatever is in the file: the job ends where it could be read before.
CANNOT_BE_READ = "cannot be read"


class Row(NamedTuple):
    """One row of a table (`value` is a mapping) or one source file (`value` is its bytes, `line` is None)."""

    name: str
    line: int | None
    value: Any


class Rejection(NamedTuple):
    """A document, or with `line` None a whole file, that cannot be used. Equal `kind`s are counted together."""

    name: str
    line: int | None
    kind: str
    detail: str = ""

    @property
    def reason(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


class Fault(Exception):
    """A whole file cannot be used, or not beyond a point: what a Rejection says of it."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def of(self, name: str) -> Rejection:
        return Rejection(name, None, self.kind, self.detail)

    def __str__(self) -> str:
        return self.of("").reason


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where the next block starts: `offset` in decompressed bytes (JSON Lines), rows (Parquet, hub) or files (tree, tar); in a tar
    archive `inner` is the offset in that file."""

    source: int = 0
    offset: int = 0
    line: int = 1
    inner: int = 0


@dataclass(kw_only=True)
class Block:
    """The unit of work of a worker: `lines` of JSON (bytes) or `rows`, and what the reader itself had to refuse."""

    name: str
    after: Position
    done_bytes: int  # of the whole input, as it lies on disk; for progress only
    first_line: int = 1
    lines: bytes = b""
    rows: list[Row] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    note: str = ""  # for a person: what the reader passes over on purpose, which is no fault


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What the readers need from the command line."""

    columns: tuple[str, ...] = ("content",)  # the fields of a row that anything looks at
    needed: tuple[str, ...] = ("content",)  # those without which a table is of no use
    suffixes: tuple[str, ...] = (".py",)  # of source files inside an archive
    hub_split: str = "train"
    verify: bool = True  # decompress a file once to its end before its first line is used


def too_long() -> str:
    return f"line longer than {MAX_LINE_BYTES} bytes"


#: What `field_of` answers where there is no such field; None is a value of JSON.
MISSING = object()


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """The field of this name; where there is none and the name has dots, the field inside objects that they lead to."""
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    while dot:
        if isinstance(row.get(outer), Mapping):
            return field_of(row[outer], inner)
        more, dot, inner = inner.partition(".")
        outer = f"{outer}.{more}"
    return MISSING
