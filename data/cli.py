"""What every command shares, those of `launch/` too: user errors and exit codes.

There are two kinds of error. A `UserError` is raised on purpose; it says in one sentence what is wrong, where, and what would be
right: `error: <sentence>`, exit code 2. Everything else is a fault of the program: it keeps its traceback, exit code 1.

The operating system's errors can be either, and `as_user_error` is the one place that decides: a file that is missing, a
permission, a full or read-only disk, a name too long, a limit on memory, processes or open files are the user's, wherever they
come up, unless the path belongs to Python or its packages. So code that opens a user's path need not catch OSError; it does so
only where it knows a better sentence.
"""

from __future__ import annotations

import codecs
import errno
import locale
import os
import re
import sysconfig
from enum import IntEnum

#: For numpy's linear algebra, which would start a thread a core when it is loaded and is not used by the commands of `data/`.
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Exit(IntEnum):
    """Every exit code there is, and whether starting the same command again helps. launch/README.md has the table for users."""

    DONE = 0  # finished, or stopped cleanly with everything saved: yes, it goes on
    FAULT = 1  # a fault of the program, a rank that failed or died, damage that verify.py found: yes, once
    USER_ERROR = 2  # a mistake in the input, a full disk: after mending it
    STALLED = 17  # a hang was ended; the last line names who is behind: yes
    INTERRUPTED = 130  # 128 + SIGINT; of another signal n 128 + n: yes, from what was saved last


class UserError(ValueError):
    """Something that a person can mend. The message is one sentence: what, where, what would be right."""


class NotFound(UserError, FileNotFoundError):
    """A `UserError` about something that is not there."""


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_HANDLES = frozenset({errno.EMFILE, errno.ENFILE})
_ROOM = frozenset({errno.ENOMEM, errno.EAGAIN})  # EAGAIN: of a fork
#: What a process may not have, which says nothing about the file that it was to be for.
LIMITS = _HANDLES | _ROOM
#: What the operating system says where a path, a disk or a limit is not as the command needs it.
MENDABLE = (
    _FULL
    | LIMITS
    | {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS}
    | {errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.EMEDIUMTYPE}
)


_MORE_ROOM = "give it less to do, or raise its limits (ulimit -v, ulimit -u, a container's memory and pids)"
#: How Python and torch say it where they raise a bare RuntimeError.
NO_ROOM = ("can't start new thread", "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def as_user_error(error: BaseException) -> UserError | None:
    """The error as one that a person can mend, or None for a fault of the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in MENDABLE and not _is_programs(error.filename):
        return UserError(sentence(error))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in NO_ROOM)):
        reason = " ".join(str(error).split())[:200]
        return UserError(f"not enough memory or threads for this process{': ' * bool(reason)}{reason}; {_MORE_ROOM}")
    return None


def _is_programs(filename: object) -> bool:
    """Whether a path lies in Python, its packages or the kernel's own file systems."""
    if not isinstance(filename, (str, bytes)):
        return False  # a write or fsync, which name no file
    path = os.path.abspath(os.fsdecode(filename))
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return any(path.startswith(place + os.sep) for place in (*places, "/proc", "/sys"))


def sentence(error: BaseException) -> str:
    """The error in one line. An operating system's error names its file and, where there is one, the remedy."""
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes))]
    said = f"{' -> '.join(names)}: {error.strerror}" if names else error.strerror
    if error.errno in _FULL:
        said += "; make room and run the same command again, it goes on from what is there"
    elif error.errno in _HANDLES:
        said += "; raise the limit (ulimit -n) and run the same command again"
    elif error.errno == errno.EEXIST and names and os.path.islink(names[-1]) and not os.path.exists(names[-1]):
        said += f" as a link to {os.readlink(names[-1])}, which is not there; make that, or remove the link"
    elif error.errno in _ROOM:
        said += f"; {_MORE_ROOM}"
    return one_line(said)


def counted(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def printable(text: str) -> str:
    """`text` for any terminal: bytes of a file name that are no UTF-8 are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
    """`printable`, with line ends and other control characters written out, which a file's name may hold: no line of its own."""
    return re.sub(r"[\0-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], printable(text))


def hold_standard_streams() -> None:
    """Opens /dev/null as those of the descriptors 0, 1 and 2 that this process was started without (`<&-`, some daemons).

    A file that got such a number would be given what is printed, and a pipe be lost in a child that is given its own streams.
    """
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(lowest, True)
    os.close(lowest)


def encoding_fault() -> str | None:
    """Why no command works in this interpreter: with ASCII for all text, files of libraries and every argument beyond it are
    unreadable. None where it reads more."""
    encoding = locale.getpreferredencoding(False)
    if codecs.lookup(encoding).name != "ascii":
        return None
    return f"Python reads all text as ASCII ({encoding}) here; unset PYTHONUTF8, or set LC_ALL=C.UTF-8"
