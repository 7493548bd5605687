"""What every command of `data/` shares: a user's mistake is one sentence and exit code 2; progress for people and for logs."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

#: What a person or a machine can get wrong. Anything else is a fault of the program and keeps its traceback.
USER_ERRORS = (ValueError, OSError)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
LOG_INTERVAL_S = 5.0
#: For numpy's linear algebra, which would start a thread a core when it is loaded and is not used here.
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def sentence(error: BaseException) -> str:
    """The error in one line; an operating system's error names its file and, for a full disk, what to do."""
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split())
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}{error.strerror}; make room and run the same command again, it goes on from what is there"
    return f"{where}{error.strerror}"


def exit_code(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; a user's mistake becomes `error: <sentence>` on stderr and exit code 2."""
    try:
        return main() or 0
    except SystemExit as left:  # argparse has spoken already
        return left.code if isinstance(left.code, int) else EXIT_USER_ERROR
    except BrokenPipeError:  # `| head` closed our stdout
        return 0
    except USER_ERRORS as error:
        if os.environ.get("MOE_TRACEBACK"):
            raise
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again, it goes on from what is there", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


def leave(code: int) -> NoReturn:
    """End the process; what is still in stdout's buffer may find a closed pipe there."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


class Progress:
    """A tqdm bar on a terminal; otherwise one plain line every few seconds. Counts bytes of input, shows documents too."""

    def __init__(self, total_bytes: int, *, done_bytes: int = 0, what: str = "preprocess") -> None:
        self.total, self.first, self.done, self.what = total_bytes, done_bytes, done_bytes, what
        self.documents = 0
        self.start = self.said = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_bytes or None, initial=done_bytes, unit="B", unit_scale=True, desc=what)

    def update(self, done_bytes: int, documents: int) -> None:
        """`done_bytes` of input are behind us; `documents` more were read."""
        step, self.done = done_bytes - self.done, done_bytes
        self.documents += documents
        seconds = max(time.monotonic() - self.start, 1e-6)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.documents / seconds:,.0f} documents/s", refresh=False)
            self.bar.update(step)
        elif time.monotonic() - self.said >= LOG_INTERVAL_S:
            self.said = time.monotonic()
            print(self._line(seconds), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        rate = (self.done - self.first) / seconds
        line = f"{self.what}: {self.documents:,} documents, {self.documents / seconds:,.0f} documents/s, {rate / 1e6:.1f} MB/s"
        if self.total and rate:
            left = max(self.total - self.done, 0) / rate
            line += f", {100 * self.done / self.total:.0f} %, {left:,.0f} s to go"
        return line

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
