"""What every command shares, those of `launch/` too: user errors, exit codes, lines for a person, progress.

There are two kinds of error. A `UserError` is raised on purpose; it says in one sentence what is wrong, where, and what would be
right: `error: <sentence>`, exit code 2. Everything else is a fault of the program: it keeps its traceback, exit code 1.

The operating system's errors can be either, and `as_user_error` is the one place that decides: a file that is missing, a
permission, a full or read-only disk, a name too long, a limit on memory, processes or open files are the user's, wherever they
come up, unless the path belongs to Python or its packages. So code that opens a user's path need not catch OSError; it does so
only where it knows a better sentence.

MOE_TRACEBACK=1 in the environment prints the traceback before the sentence, for whoever debugs.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import locale
import os
import queue
import re
import select
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn, TextIO

from data.redact import redact_text

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


def check_utf8(text: str, name: str) -> None:
    """Raises UserError for half a surrogate pair, which is how Python holds bytes that are no UTF-8. `name`: what the text is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is no UTF-8: character {error.start} is half a surrogate pair, {text[error.start]!r}") from None


def report(error: BaseException, *, who: str = "", interrupted: str = "interrupted") -> int:
    """Say why a command ends, as `error: <sentence>` or with a traceback, and return its exit code. `who`: such as `rank 3`."""
    known = as_user_error(error)
    if isinstance(error, KeyboardInterrupt):
        say(interrupted)
        return Exit.INTERRUPTED
    if known is None or os.environ.get("MOE_TRACEBACK"):
        say("".join(traceback.format_exception(error)).rstrip())
    if known is None:
        return Exit.FAULT
    say(f"error{' on ' + who if who else ''}: {sentence(known)}")
    return Exit.USER_ERROR


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


def exit_code(main: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Run a command's `main`; whatever it raises becomes a line or a traceback on stderr and an exit code.

    `interrupted`: what Ctrl-C is answered with.
    """
    try:
        if fault := encoding_fault():
            raise UserError(fault)
        return main() or Exit.DONE
    except SystemExit as left:  # argparse has spoken already
        return left.code if isinstance(left.code, int) else Exit.USER_ERROR
    except (Exception, KeyboardInterrupt) as error:
        return report(error, interrupted=interrupted)
    finally:
        drain()


def leave(code: int) -> NoReturn:
    """End the process with what was said, even where nobody reads it."""
    drain()
    try:
        if sys.stdout is not None:  # None: the descriptor was closed when the process started
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


class Voice:
    """Standard output or error for people: it can neither fail nor hold up the program.

    What is written goes through a bounded queue to a thread. Where a terminal is stopped (Ctrl-S), a pipe is full or closed, or the
    disk below a redirected log is full, text is lost and the program goes on. A file for print and tqdm.
    """

    LIMIT = 1000  # texts that wait; the rest is lost

    def __init__(self, name: str) -> None:
        self.name = name  # of the stream in `sys`, looked up at each write: tests put others there
        self._waiting: queue.Queue[str | None] = queue.Queue(self.LIMIT)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """A forked process has neither the thread nor, perhaps, whole locks."""
        self._waiting, self._lock, self._thread = queue.Queue(self.LIMIT), threading.Lock(), None

    @property
    def stream(self) -> TextIO:
        found: TextIO = getattr(sys, self.name)
        return found

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        """For tqdm, which asks a terminal for its width."""
        return self.stream.fileno()

    def write(self, text: str) -> int:
        if self.stream is not None:  # None for a process without one
            with self._lock:
                if self._thread is None:
                    self._thread = self._start()
                if self._thread is None:
                    self._put_if_possible(text)
                    return len(text)
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(text)
        return len(text)

    def _start(self) -> threading.Thread | None:
        """The thread that writes, or None where the system has no room for one."""
        thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return None
        return thread

    def flush(self) -> None:
        """Nothing: tqdm flushes at every step, and must not wait for a terminal."""

    def drain(self, seconds: float = 2.0) -> None:
        """Wait until all is written, end the thread (so that this process may fork); no longer than `seconds` if nobody reads."""
        with self._lock:
            if self._thread is None:
                return
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=seconds)
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def _run(self) -> None:
        while (text := self._waiting.get()) is not None:
            self._put_if_possible(text)

    def _put_if_possible(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
            self._put(text)

    def _put(self, text: str) -> None:
        """To the descriptor itself: a thread that hangs in a buffered stream would hold a lock that the interpreter's end needs."""
        data = text.encode(self.encoding, "backslashreplace")
        try:
            handle = self.stream.fileno()
        except (OSError, AttributeError):  # a test's stream in memory
            self.stream.write(data.decode(self.encoding))
            return
        while data:
            try:
                data = data[os.write(handle, data) :]
            except BlockingIOError:  # a terminal that somebody made non-blocking
                select.select([], [handle], [])


stdout, stderr = Voice("stdout"), Voice("stderr")


def drain() -> None:
    """Wait (not for long) until everything that was said is written."""
    stdout.drain()
    stderr.drain()


def say(text: str, out: Voice = stderr) -> None:
    """One line for a person, above the progress bar if there is one, without secrets."""
    text = redact_text(text)
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # a signal's thread may speak while that is being imported
    if bars is None:
        out.write(text + "\n")
    else:
        bars.write(text, file=out)


def write_out(text: str, end: str = "\n") -> None:
    """What a command was asked for, on standard output: the error names it. Raises BrokenPipeError where nobody reads any more."""
    shown = text.encode(stdout.encoding, "backslashreplace").decode(stdout.encoding)  # as `say` does
    try:
        print(shown, end=end, flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


class Progress:
    """A tqdm bar on a terminal; otherwise one plain line every few seconds. Counts bytes of input or steps."""

    LOG_INTERVAL_S = 5.0

    def __init__(self, total: int, *, what: str, unit: str = "B", done: int = 0) -> None:
        self.total, self.first, self.done, self.what, self.unit = total, done, done, what, unit
        self.start = self.said = time.monotonic()
        self.bar = None
        if stderr.isatty():
            from tqdm import tqdm

            scale = unit == "B"
            self.bar = tqdm(
                total=total or None, initial=done, unit=unit, unit_scale=scale, desc=what, file=stderr, dynamic_ncols=True
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self.start, 1e-6)

    def update(self, done: int, note: str = "", *, force: bool = False) -> None:
        """`done` of the total is behind us; `note` is shown with it. `force`: a line now, also where there is no terminal."""
        step, self.done = done - self.done, done
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=force)
            self.bar.update(step)
        elif force or time.monotonic() - self.said >= self.LOG_INTERVAL_S:
            self.said = time.monotonic()
            say(self.line(note))

    def line(self, note: str) -> str:
        """What a log gets: the note, rate, share and time to go."""
        rate = (self.done - self.first) / self.seconds
        shown = f"{rate / 1e6:.1f} MB/s" if self.unit == "B" else f"{rate:.2f} {self.unit}/s"
        parts = [note, shown] if note else [shown]
        if self.total and rate:
            parts += [f"{100 * self.done / self.total:.0f} %", f"{max(self.total - self.done, 0) / rate:,.0f} s to go"]
        return f"{self.what}: {', '.join(parts)}"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
