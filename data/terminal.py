"""Speaking to a person: lines, results, progress, and how a command ends.

MOE_TRACEBACK=1 in the environment prints the traceback before the sentence, for whoever debugs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

from data.cli import Exit, UserError, as_user_error, encoding_fault, sentence
from data.redact import redact_text

PLAIN_SECONDS = 5.0  # between two lines of a log, where there is no terminal


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
        elif force or time.monotonic() - self.said >= PLAIN_SECONDS:
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
