"""A program's folder on the host's own disk, counted and removed whatever the program has made of it.

Paths may be too long to be named, folders closed to their owner, and names exchanged for links while they are looked at. So it
goes by open folders, and opens only what is one.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: Folders inside of each other; more are a program's that wants not to be counted.
DEEPEST = 100


def folder_use(folder: str) -> tuple[int, int]:
    """(bytes, files and folders). Raises OSError for what cannot be counted."""
    with opened(folder) as handle:
        return _use(handle, 0)


def _use(folder: int, depth: int) -> tuple[int, int]:
    if depth > DEEPEST:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    size = files = 0
    for name in os.listdir(folder):
        with suppress(FileNotFoundError, NotADirectoryError):  # gone, or another thing by now
            about = os.stat(name, dir_fd=folder, follow_symlinks=False)
            size, files = size + about.st_size, files + 1
            if stat.S_ISDIR(about.st_mode):
                with opened(name, folder) as inner:
                    more, below = _use(inner, depth + 1)
                size, files = size + more, files + below
    return size, files


def remove(folder: str) -> None:
    """Never raises: what is left is left. Folders come up to the first before they go, so that depth is no matter."""
    with suppress(OSError):
        with opened(folder) as top:
            while names := os.listdir(top):
                if not [name for name in names if _emptied(name, top)]:
                    return  # nothing more can be removed
        os.rmdir(folder)


def _emptied(name: str, top: int) -> bool:
    """Remove what stands there; of a folder first what is in it, its own folders moved beside it."""
    with suppress(OSError):
        if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=top)
            return True
        with opened(name, top) as inner:
            for held in os.listdir(inner):
                if stat.S_ISDIR(os.stat(held, dir_fd=inner, follow_symlinks=False).st_mode):
                    with opened(held, inner):  # to move it takes the right to write into it
                        os.rename(held, secrets.token_hex(8), src_dir_fd=inner, dst_dir_fd=top)
                else:
                    os.unlink(held, dir_fd=inner)
        os.rmdir(name, dir_fd=top)
        return True
    return False


@contextmanager
def opened(name: str, inside: int | None = None) -> Iterator[int]:
    """A folder's descriptor, and all rights of its owner, whoever took them. Raises OSError for a link or anything else."""
    place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
    try:
        path = f"/proc/self/fd/{place}"
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(path, mode | stat.S_IRWXU)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(place)
    try:
        yield handle
    finally:
        os.close(handle)
