"""One process at a time in a folder: a job of preprocessing, a run of training."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
import weakref
from pathlib import Path
from typing import IO, Any

from data.cli import UserError
from data.files import is_open_at, make_folder
from data.terminal import say

WHO = "process "  # what a lock begins with


class LockHeld(BlockingIOError):
    """Another process holds the folder; `holder` says which."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is in use by {holder}")
        self.folder, self.holder = folder, holder


class FolderLock:
    """Holds a folder against a second job or run, by the kernel's lock on `folder/.lock`, or on a file of another name for a part
    of it.

    The kernel frees the lock of a process that died, so none is ever left over. A forked child gives its copy up at once: a
    worker that outlives its job must not hold the folder.
    """

    NAME = ".lock"

    def __init__(self, folder: Path, name: str = NAME) -> None:
        self.folder, self.name = folder, name
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """True when it is held; False where the file system has no locks, of which `take_folder` warns. Raises LockHeld."""
        make_folder(self.folder)
        path = self.folder / self.name
        file = open(path, "r+", encoding="utf-8", errors="replace", opener=_ours)  # noqa: SIM115 - held
        try:
            locked = _try_past_a_look(file)
        except BlockingIOError:
            with file:
                raise LockHeld(self.folder, file.read(200).strip() or "another process") from None
        if not is_open_at(file.fileno(), path):  # whoever held it removed it as the last thing: it keeps nobody out any more
            file.close()
            return self.take()
        held_before = file.read(200)
        if held_before and not held_before.startswith(WHO):
            file.close()
            raise UserError(f"{path} is not a lock of this program, or a link to another file; remove it")
        self._file = file
        _held.add(self)
        with contextlib.suppress(OSError):  # a full disk: the name is only for the message
            file.seek(0)
            file.truncate()
            file.write(f"{WHO}{os.getpid()} on {socket.gethostname()}")
            file.flush()
        return locked

    def release(self) -> None:
        """The folder is free. The file stays; only its holder may remove it, before this."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def try_lock(file: IO[Any], kind: int = fcntl.LOCK_EX) -> bool:
    """Hold an open file by the kernel's lock; False where the file system has none. Raises BlockingIOError if another holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError(*error.args) from None
    except OSError:
        return False
    return True


def _ours(path: str, flags: int) -> int:
    """Open a lock; whoever can write to the folder could have it truncate a file elsewhere by a link, or wait for a FIFO."""
    handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EMEDIUMTYPE, "not a regular file", path)
    return handle


def take_folder(folder: Path, who: str, *, flag: str = "--output") -> FolderLock:
    """Hold the folder of `flag` against a second `who` ("job", "run"). Raises UserError that names the process which holds it."""
    lock = FolderLock(folder)
    try:
        if not lock.take():
            say(f"warning: {folder} lies on a file system without locks: nothing keeps a second {who} out of it")
    except LockHeld as held:
        raise UserError(f"{folder} is in use by another {who} ({held.holder}); end it or name another {flag}") from None
    return lock


def _try_past_a_look(file: IO[str]) -> bool:
    """`try_lock`, for a moment: whoever asks `is_held` holds it as well, and lets go at once."""
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            return try_lock(file)
        time.sleep(0.02)
    return try_lock(file)


def is_held(folder: Path) -> bool | None:
    """Whether a process holds the folder; None where that cannot be told: no lock that may be read, or one of another host.

    Who asks holds a shared lock for some microseconds: readers do not see each other, and who takes the folder waits for it."""
    try:
        file = open(folder / FolderLock.NAME, encoding="utf-8", errors="replace", opener=_readers)  # noqa: SIM115 - below
    except OSError:
        return None
    with file:
        try:
            if not try_lock(file, fcntl.LOCK_SH):
                return None
        except BlockingIOError:
            return True
        holder = file.read(200)
    # That nobody has it is sure only on the host that took it: many a shared file system keeps locks for each host by itself.
    return False if holder.startswith(WHO) and holder.endswith(f" on {socket.gethostname()}") else None


def _readers(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
