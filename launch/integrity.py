"""Files that are either whole or known to be damaged: checksums, manifests, durable writes, publishing by rename.

A folder is complete when it has a `manifest.json`: that is written last, names every other file with its size and checksum,
and everything before it is already on the disk. Nothing here is collective and nothing unpickles.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
#: Read at a time when hashing: 4 MiB; larger blocks were no faster.
BLOCK_BYTES = 4 << 20
#: Folders that only this module makes: being written, on the way to deletion, replaced by another of the same name.
_OURS = re.compile(r"\.(tmp|trash|replaced)-.+-[0-9a-f]{8}")
_RENAME_EXCHANGE = 2

T = TypeVar("T")
FileRecord = dict[str, Any]  # {"bytes": int, "xxh3_128": str}


class DamagedError(ValueError):
    """A file is missing, cut short or not what was written; the message names it."""


class HashingFile:
    """A binary file for `torch.save` that hashes what passes through, so that the checksum is of what was meant to be
    written, not of what a full or faulty disk made of it. `close` returns only when the bytes are on the disk."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._hash = xxhash.xxh3_128()
        self._bytes = 0
        self.error: OSError | None = None  # the first; torch reports it as something else

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> FileRecord:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return {"bytes": self._bytes, "xxh3_128": self._hash.hexdigest()}


def write_durably(path: Path, data: bytes) -> FileRecord:
    """Write and fsync a file; returns its manifest record."""
    file = HashingFile(path)
    try:
        file.write(data)
    finally:
        record = file.close()
    return record


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's content, as hexadecimal digits."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def record_file(path: Path) -> FileRecord:
    """The record of a file that somebody else wrote, which is also brought to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, files: Mapping[str, FileRecord], **about: Any) -> None:
    """Complete a folder. `files`: every file of it, by its path relative to the folder."""
    body = {"format": MANIFEST_FORMAT, **about, "files": dict(sorted(files.items()))}
    body["checksum"] = _checksum(body)
    for inner in sorted({(folder / name).parent for name in files}, reverse=True):
        sync_folder(inner)
    write_durably(folder / MANIFEST, to_json(body))
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete folder. Errors: `DamagedError` where it is missing or damaged."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("checksum")
        good = checksum == _checksum(body) and isinstance(body["files"], dict)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: the checkpoint was never completed") from None
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise DamagedError(f"{path} is damaged ({type(error).__name__})") from None
    if not good:
        raise DamagedError(f"{path} is damaged: its own checksum is wrong")
    if body["format"] > MANIFEST_FORMAT:
        raise ValueError(f"{path} has format {body['format']}, made by a newer version; this one reads {MANIFEST_FORMAT}")
    return body


def _checksum(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(to_json(body)).hexdigest()


def check_files(folder: Path, files: Mapping[str, FileRecord], hashed: Iterable[str]) -> None:
    """Every file is there at its size, and those in `hashed` have their checksum. Errors: `DamagedError` naming the file."""
    for name, record in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{folder / name} cannot be read ({error.strerror})") from None
        if size != record["bytes"]:
            raise DamagedError(f"{folder / name} has {size:,} bytes, {record['bytes']:,} were written")
    for name in hashed:
        try:
            good = hash_file(folder / name) == files[name]["xxh3_128"]
        except OSError as error:
            raise DamagedError(f"{folder / name} cannot be read ({error.strerror})") from None
        if not good:
            raise DamagedError(f"{folder / name} is damaged: its checksum is not the one it was written with")


def attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """(result, "") or (None, what is damaged): damage is an answer to gather from all ranks, not yet an error."""
    try:
        return action(), ""
    except DamagedError as error:
        return None, str(error)


def share(files: Mapping[str, FileRecord], rank: int, world_size: int) -> list[str]:
    """The files that `rank` hashes, so that the bytes spread evenly: largest first, each to the least loaded rank."""
    loads, mine = [0] * world_size, []
    for name in sorted(files, key=lambda n: (-files[n]["bytes"], n)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name]["bytes"]
        if lightest == rank:
            mine.append(name)
    return mine


# ---------------------------------------------------------------------- names


def working_name(folder: Path, kind: str) -> Path:
    """A fresh hidden name beside `folder`; `kind` is tmp, trash or replaced."""
    return folder.with_name(f".{kind}-{folder.name}-{secrets.token_hex(4)}")


def leftovers(parent: Path) -> list[Path]:
    """What dead processes left: folders with names of `working_name`. Others' hidden folders are not ours to touch."""
    return sorted(p for p in parent.iterdir() if _OURS.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


def publish(temporary: Path, final: Path) -> None:
    """Give a complete folder its name. Where the name is taken, the two are exchanged and the old one is deleted."""
    if not final.exists():
        os.rename(temporary, final)
    elif exchange(temporary, final):
        sync_folder(final.parent)
        discard(temporary)
    else:
        # Two steps; `recover` undoes the first if the second never comes.
        old = working_name(final, "replaced")
        os.rename(final, old)
        os.rename(temporary, final)
        sync_folder(final.parent)
        discard(old)
    sync_folder(final.parent)


def recover(parent: Path) -> None:
    """Put back what `publish` had moved aside when the process died between its two renames."""
    for old in leftovers(parent):
        match = re.fullmatch(r"\.replaced-(.+)-[0-9a-f]{8}", old.name)
        if match and not (parent / match[1]).exists():
            os.rename(old, parent / match[1])
            sync_folder(parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one atomic step where the kernel and the file system can (Linux renameat2); False where not."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here = -100  # AT_FDCWD
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE) == 0


def discard(folder: Path) -> None:
    """Delete a folder. It loses its name first, so that a half-deleted one is never taken for complete."""
    trash = working_name(folder, "trash") if not folder.name.startswith(".trash-") else folder
    if trash != folder:
        os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def replace_file(path: Path, data: bytes) -> None:
    """Replace a small file atomically: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    write_durably(temporary, data)
    os.replace(temporary, path)
    sync_folder(path.parent)
