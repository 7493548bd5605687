"""Files that are either whole or known to be damaged: checksums, and a manifest that comes last.

A folder is complete when it has a `manifest.json`: that is written last, names every other file with its size and checksum,
and everything before it is already on the disk. Nothing here is collective and nothing unpickles.

Damage is what the bytes say (a file is missing, short, or other than what was written): a `DamagedError`, and an older checkpoint
may serve. What the system fails to read says nothing about the bytes, so it is read again, and then refused (`UnreadableError`):
passing over a checkpoint that is whole could throw away days.
"""

from __future__ import annotations

import io
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, TypeGuard, TypeVar

import xxhash

from data.cli import UserError, sentence
from data.files import hash_file, is_inside, replace_file, small_file, sync_folder

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
HASH = xxhash.xxh3_128
#: Seconds to wait before a file that could not be read is tried again: a network file system's hiccup lasts as long.
RETRY_AFTER: tuple[float, ...] = (0.1, 0.5, 2.0)
#: Bytes that are read or written at a time, and written ones then brought to the disk: a disk that moves shows it within seconds,
#: where a large memory would take in a whole checkpoint and leave it to one fsync of half an hour.
PART_BYTES = 1 << 28

T = TypeVar("T")


class FileRecord(TypedDict):
    """What a manifest says about one file."""

    bytes: int
    xxh3_128: str


def is_file_table(files: object) -> TypeGuard[dict[str, FileRecord]]:
    """Whether a manifest's `files` has a record of each; whether the names are those of files in its folder `is_inside` says."""
    return isinstance(files, dict) and all(
        isinstance(record, dict) and isinstance(record.get("bytes"), int) and isinstance(record.get("xxh3_128"), str)
        for record in files.values()
    )


class DamagedError(UserError):
    """A file is missing, cut short or not what was written; the message names it."""


class UnreadableError(UserError):
    """The system cannot read a file, again and again; whether it is whole is not known."""


class HashingFile:
    """A binary file for `torch.save` that hashes what passes through, so that the checksum is of what was meant to be
    written, not of what a full or faulty disk made of it. `close` returns only when the bytes are on the disk.

    `on_write` is called after each part of what is written, for a watchdog.
    """

    def __init__(self, path: Path, on_write: Callable[[], object] = lambda: None) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._hash = xxhash.xxh3_128()
        self._bytes = self._unsynced = 0
        self._on_write = on_write
        self.error: OSError | None = None  # the first; torch reports it as something else

    def write(self, data: bytes | memoryview) -> int:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), PART_BYTES):
            self._write_part(whole[start : start + PART_BYTES])
        return len(whole)

    def _write_part(self, part: memoryview) -> None:
        self._hash.update(part)
        self._bytes += len(part)
        self._unsynced += len(part)
        try:
            self._file.write(part)
            if self._unsynced >= PART_BYTES:
                self._unsynced = 0
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self.error = self.error or error
            raise
        self._on_write()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> FileRecord:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return {"bytes": self._bytes, "xxh3_128": self._hash.hexdigest()}


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def record_file(path: Path, on_read: Callable[[], object] = lambda: None) -> FileRecord:
    """The record of a file that somebody else wrote, which is also brought to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": hash_file(path, HASH, on_read)}


def record_all(folder: Path, on_read: Callable[[], object] = lambda: None) -> dict[str, FileRecord]:
    """The records of every file in a folder, by its path relative to it."""
    return {str(p.relative_to(folder)): record_file(p, on_read) for p in folder.rglob("*") if p.is_file()}


def write_manifest(folder: Path, files: Mapping[str, FileRecord], **about: Any) -> None:
    """Complete a folder. `files`: every file of it, by its path relative to the folder."""
    body = {"format": MANIFEST_FORMAT, **about, "files": dict(sorted(files.items()))}
    body["checksum"] = _checksum(body)
    for inner in sorted({(folder / name).parent for name in files}, reverse=True):
        sync_folder(inner)
    replace_file(folder / MANIFEST, to_json(body))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete folder: `files`, and whatever `write_manifest` was told about it.

    Raises DamagedError where it is missing, damaged or names a file outside the folder, UserError for a newer format.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(_reading(path, partial(small_file, path), missing="is missing: its folder was never completed"))
        checksum = body.pop("checksum")
        good = checksum == _checksum(body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{path} is damaged ({type(error).__name__})") from None
    if not good:
        raise DamagedError(f"{path} is damaged: its own checksum is wrong")
    if not isinstance(body.get("format"), int) or body["format"] > MANIFEST_FORMAT:
        raise UserError(f"{path} has format {body.get('format')}, made by a newer version; this one reads {MANIFEST_FORMAT}")
    if not is_file_table(body.get("files")):
        raise DamagedError(f"{path} is damaged: it does not list its files with their sizes and checksums")
    outside = [name for name in body["files"] if not is_inside(name)]
    if outside:
        raise DamagedError(f"{path} is damaged: it names {outside[0]!r}, which is not a file of this folder")
    return dict(body)


def _checksum(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(to_json(body)).hexdigest()


def check_listed(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Nothing that would be loaded lies there unverified. Raises DamagedError naming the file."""
    for path in sorted(folder.glob("*.pt")):
        if path.name not in files:
            raise DamagedError(f"{path} is not listed in {MANIFEST}: it was put there, or {MANIFEST} is another checkpoint's")


def check_files(
    folder: Path, files: Mapping[str, FileRecord], hashed: Iterable[str], on_read: Callable[[], object] = lambda: None
) -> None:
    """Every file is there at its size, and those in `hashed` have their checksum. Raises DamagedError naming the file."""
    for name, record in files.items():
        path = folder / name
        found = _reading(path, path.stat)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{path} is no regular file")
        if found.st_size != record["bytes"]:
            raise DamagedError(f"{path} has {found.st_size:,} bytes, {record['bytes']:,} were written")
    for name in hashed:
        if _hash_of(folder / name, on_read) != files[name]["xxh3_128"]:
            raise DamagedError(f"{folder / name} is damaged: its checksum is not the one it was written with")


def _hash_of(path: Path, on_read: Callable[[], object]) -> str:
    return _reading(path, lambda: hash_file(path, HASH, on_read))


def _reading(path: Path, action: Callable[[], T], *, missing: str = "is missing") -> T:
    """What `action` reads of `path`. Raises DamagedError where it is not there, UnreadableError where it cannot be read."""
    for pause in (*RETRY_AFTER, None):
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError):
            raise DamagedError(f"{path} {missing}") from None
        except OSError as error:
            if pause is None:
                raise UnreadableError(
                    f"{path} cannot be read ({error.strerror or sentence(error)}), also when tried again; "
                    "mend that, or move the folder away to do without it"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def read_verified(path: Path, record: FileRecord, on_read: Callable[[], object] = lambda: None) -> BinaryIO:
    """A file's content, verified as it is in memory: a disk may give other bytes than when it was verified.

    Raises DamagedError where it is other than was written, UnreadableError where it cannot be read.
    """
    content = _reading(path, lambda: _read(path, on_read))
    if xxhash.xxh3_128(content.getbuffer()).hexdigest() != record["xxh3_128"]:
        raise DamagedError(f"{path} reads otherwise than when it was verified a moment ago: its disk or this host's memory fails")
    return content


def _read(path: Path, on_read: Callable[[], object]) -> io.BytesIO:
    """A whole file, without a second copy of it on the way."""
    with open(path, "rb", buffering=0) as file:
        content, start = io.BytesIO(bytes(os.fstat(file.fileno()).st_size)), 0
        with content.getbuffer() as view:
            while count := file.readinto(view[start : start + PART_BYTES]):
                start += count
                on_read()
    return content


def find_manifest(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """(manifest, "") of a complete folder, or (None, what is damaged): damage is an answer to gather, not yet an error."""
    try:
        manifest = read_manifest(folder)
        check_listed(folder, manifest["files"])
        return manifest, ""
    except DamagedError as error:
        return None, str(error)


def first_damage(
    folder: Path, files: Mapping[str, FileRecord], hashed: Iterable[str], on_read: Callable[[], object] = lambda: None
) -> str:
    """What is wrong with the first damaged file, as `check_files` says it; empty where all are whole."""
    try:
        check_files(folder, files, hashed, on_read)
    except DamagedError as error:
        return str(error)
    return ""


def share(files: Mapping[str, FileRecord], rank: int, world_size: int) -> list[str]:
    """The files that `rank` hashes, so that the bytes spread evenly: largest first, each to the least loaded rank."""
    loads, mine = [0] * world_size, []
    for name in sorted(files, key=lambda n: (-files[n]["bytes"], n)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name]["bytes"]
        if lightest == rank:
            mine.append(name)
    return mine
