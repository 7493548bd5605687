"""What a job reads, file by file, so that a job that goes on reads the same: name, bytes, time and a hash of both ends.

A job that was killed knows only how far it was. If a file was renamed or rewritten meanwhile, going on would lose documents or mix
old and new ones without a trace. `inputs.jsonl` stays in the finished folder as the record of what was read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from data.cli import UserError
from data.files import replace_file
from data.sources.discover import Source

INPUTS = "inputs.jsonl"
#: Hashed at each end of a file: with both ends equal, a smaller file is equal altogether.
END_BYTES = 64 << 10
NAMED = 4  # changed files in a message


class InputFile(NamedTuple):
    """A file that is read. `bytes` is -1 and `ends` empty for what is none, which the reader reports."""

    name: str
    bytes: int
    modified_ns: int
    ends: str

    @classmethod
    def of(cls, name: str) -> InputFile:
        try:
            status = os.stat(name)
            if not stat.S_ISREG(status.st_mode):
                return cls(name, -1, 0, "")
            return cls(name, status.st_size, status.st_mtime_ns, _hash_ends(name, status.st_size))
        except OSError:
            return cls(name, -1, 0, "")

    def change(self, now: InputFile) -> str | None:
        """What happened to the file since, or None. Where the ends are the whole file its time says nothing more."""
        if (self.bytes < 0) != (now.bytes < 0):
            return "cannot be read" if now.bytes < 0 else "can be read"
        if self.bytes != now.bytes:
            return f"has {now.bytes} bytes instead of {self.bytes}"
        if self.ends != now.ends:
            return "was written to"
        if self.modified_ns != now.modified_ns and self.bytes > 2 * END_BYTES:
            return "has another time of modification"
        return None


def _hash_ends(name: str, size: int) -> str:
    digest = xxhash.xxh3_128()
    with open(name, "rb", buffering=0) as file:
        digest.update(file.read(END_BYTES))
        file.seek(max(size - END_BYTES, END_BYTES))
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def list_inputs(sources: Sequence[Source], others: Iterable[str]) -> list[InputFile]:
    """Every file of the sources in the order in which they are read, then `others`. Not what a hub holds."""
    return [InputFile.of(name) for name in (*_names(sources), *others)]


def _names(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        if source.kind == "tree":
            yield from (os.path.join(source.name, name) if name else source.name for name in source.files)
        elif source.kind == "file":
            yield source.name


def check_inputs(folder: Path, files: Sequence[InputFile]) -> None:
    """Raises UserError with their names where files are not those that the folder was begun with. Says nothing of older folders."""
    path = folder / INPUTS
    if not path.is_file():
        return
    before = [InputFile(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    changes = list(_changes(before, files))
    if changes:
        more = f" and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
        shown = "; ".join(changes[:NAMED])
        advice = "put it back (rsync -t and tar keep times), or name another --output"
        raise UserError(f"the input changed since {folder} was begun: {shown}{more}; {advice}")


def _changes(before: Sequence[InputFile], now: Sequence[InputFile]) -> Iterator[str]:
    old, new = ({file.name: file for file in files} for files in (before, now))
    yield from (f"{name} is gone" for name in old if name not in new)
    yield from (f"{name} is new" for name in new if name not in old)
    for name in old:
        if name in new and (change := old[name].change(new[name])):
            yield f"{name} {change}"
    if list(old) != list(new) and old.keys() == new.keys():
        yield "its files are in another order"


def write_inputs(folder: Path, files: Sequence[InputFile]) -> None:
    """Unless the folder has the record already."""
    if not (folder / INPUTS).is_file():
        replace_file(folder / INPUTS, "".join(json.dumps(file._asdict()) + "\n" for file in files).encode())


def check_unchanged(folder: Path, files: Sequence[InputFile]) -> None:
    """At the job's end: nothing was written to while it was read. Looks at size and time, and closer only where they differ."""
    for file in files:
        try:
            status = os.stat(file.name)
        except OSError:
            continue  # it was read when it was there
        if file.bytes < 0 or (status.st_size, status.st_mtime_ns) == (file.bytes, file.modified_ns):
            continue
        if change := file.change(InputFile.of(file.name)):
            again = f"remove {folder} and start again when nothing writes to the input"
            raise UserError(f"{file.name} {change}: it changed while it was read; {again}")
