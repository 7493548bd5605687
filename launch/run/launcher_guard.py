"""Ctrl-C under a launcher: the terminal's signals go to rank 0 alone.

A terminal signals every process of its foreground group, the launcher's own two included. DeepSpeed's answer with tracebacks, give
the prompt back while ranks still save, end W&B's process, and after 30 seconds kill what has not ended. So a small process, a
child of rank 0, makes itself the foreground group: Ctrl-C reaches it, it tells rank 0, and the launcher hears of it when all ranks
have ended by themselves. Ctrl-Z stops the launcher and the ranks, as it would without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import termios
from pathlib import Path
from typing import NoReturn

#: Modules that start ranks, by what their command lines have.
LAUNCHERS = (b"deepspeed.launcher", b"deepspeed/launcher", b"torch.distributed.run", b"torchrun")
FORWARDED = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTERM})
POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1


def guard_launcher() -> int | None:
    """Start the process that takes the terminal, on the first rank of a launcher in the foreground; its pid, or None elsewhere.

    Before threads are started: it is forked.
    """
    terminal = _foreground_terminal()
    if terminal is None:
        return None
    rank, group = os.getpid(), os.getpgrp()
    pid = os.fork()
    if not pid:
        try:
            _keep(terminal, rank, group)
        finally:
            os._exit(0)
    os.close(terminal)
    return pid


def _foreground_terminal() -> int | None:
    """A descriptor of the terminal, if this is a launcher's first rank here and in the foreground."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    try:
        started_by = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if not any(name in started_by for name in LAUNCHERS):
            return None
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:  # no terminal
        return None
    with contextlib.suppress(OSError, termios.error):
        # Under `stty tostop` the ranks, in the background, would be stopped by their first line.
        if os.tcgetpgrp(terminal) == os.getpgrp() and not termios.tcgetattr(terminal)[3] & termios.TOSTOP:
            return terminal
    os.close(terminal)
    return None


def _keep(terminal: int, rank: int, group: int) -> NoReturn:
    """The process: until the rank ends, then the launcher has the terminal back."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else a background process that takes the terminal is stopped
    os.closerange(0, terminal)  # a pipe behind the ranks ends when they do
    os.closerange(terminal + 1, 4096)
    os.tcsetpgrp(terminal, os.getpgrp())
    while True:
        got = signal.sigtimedwait(FORWARDED, POLL_SECONDS)
        number = got.si_signo if got is not None else None
        if os.getppid() != rank or number == signal.SIGTERM:
            break
        if number in (signal.SIGINT, signal.SIGQUIT):
            os.kill(rank, number)
        elif number == signal.SIGTSTP:
            os.tcsetpgrp(terminal, group)
            os.killpg(group, signal.SIGTSTP)
        elif number is None and os.tcgetpgrp(terminal) == group:  # `fg`
            os.tcsetpgrp(terminal, os.getpgrp())
    if os.tcgetpgrp(terminal) == os.getpgrp():
        os.tcsetpgrp(terminal, group)
    os._exit(0)
