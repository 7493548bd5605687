"""Files that are whole or absent: atomic replacement, durable folders, hashes. `launch/` uses them too.

Nothing here knows what a file is for, and every OSError that leaves this module names its file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, BinaryIO, cast

#: More than any manifest or configuration has; one that is larger is something else.
SMALL_BYTES = 1 << 28
#: What network file systems say that cannot fsync a folder (SMB, some FUSE and NFS servers): nothing more can be done there.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError of a write, fsync or close, which names no file, the file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def sync_file(file: IO[Any]) -> None:
    """Bring what was written to `file` to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make new names and renames in `folder` survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """A folder, with those above it that are missing. The name of each survives a power cut: a file that is on the disk in a folder
    whose own name is not there is lost with it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        with contextlib.suppress(PermissionError):  # a parent that may be written to and not read
            sync_folder(made.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends without an error: readers see the old content or the new.

    The data is on the disk before the name changes, and the name before this returns. After an error nothing is left behind.
    Raises OSError where something has the name that must not lose it: root could replace /dev/null.
    """
    _refuse_special(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(temporary), open(temporary, "wb") as file:
            yield file
            sync_file(file)
        os.replace(temporary, path)
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def check_replaceable(path: Path) -> None:
    """Raise, before the hours of work whose result `path` is to hold, the OSError that `replacing` would raise after them."""
    _refuse_special(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", os.fspath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to write to", os.fspath(path.parent))
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "this folder may not be written to", os.fspath(path.parent))


def _refuse_special(path: Path) -> None:
    if _is_special(path):
        raise OSError(errno.EMEDIUMTYPE, "there is something of this name that is not a regular file", os.fspath(path))


def _is_special(path: Path) -> bool:
    """A device, a pipe, a socket; or a link to one, or into /proc, where /dev/stdout leads."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or (path.is_symlink() and os.readlink(path).startswith("/proc/"))


def replace_file(path: Path, data: bytes) -> None:
    """All of `data` under the name `path`, or nothing."""
    with replacing(path) as file:
        file.write(data)


def small_file(path: Path, most: int = SMALL_BYTES) -> bytes:
    """What a small file holds: a pointer, a manifest, settings. Never waits for a FIFO, never fills the memory from a device.

    Raises OSError with the file's name, also where it is no regular file or has more than `most` bytes.
    """
    with open(path, "rb", buffering=0, opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise OSError(errno.EMEDIUMTYPE, f"not a regular file of at most {most:,} bytes", os.fspath(path))
        with naming(path):
            return file.read(most) or b""


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_json(path: Path, most: int = SMALL_BYTES, **options: Any) -> Any:
    """The value in a small file of JSON; `options` as of `json.loads`. Raises ValueError where it holds something else."""
    try:
        return json.loads(small_file(path, most), **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path, most: int = SMALL_BYTES) -> dict[str, Any]:
    """The same where it is a JSON object; empty where the file is missing or anything else: for what may be lacking."""
    try:
        value = read_json(path, most)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def replace_json(path: Path, value: Any) -> None:
    """`value` as a small file of JSON for people and programs, all or nothing; `finite` says what stands for NaN."""
    replace_file(path, (json.dumps(finite(value), indent=2) + "\n").encode())


def finite(value: Any) -> Any:
    """`value` as JSON can hold it, which knows no NaN and no infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def hash_file(path: Path, digest: str | Callable[[], Any] = "sha256", on_read: Callable[[], object] = lambda: None) -> str:
    """Hexadecimal digest of a file's content; `digest` as of `hashlib.file_digest`. `on_read` is called after each part of it, for
    a watchdog."""
    made = hashlib.new(digest) if isinstance(digest, str) else digest()

    def update(part: memoryview) -> None:
        made.update(part)
        on_read()

    with naming(path), open(path, "rb", buffering=0) as file:
        hashlib.file_digest(file, lambda: cast("Any", SimpleNamespace(update=update)))
    return str(made.hexdigest())


def is_open_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`, and was not removed, moved away or replaced since."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def is_inside(name: object) -> bool:
    """Whether a manifest's `name` is that of a file inside its folder: relative, and without a way up."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""
