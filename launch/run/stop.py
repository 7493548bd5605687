"""Stopping cleanly: signals and the clock ask, the next step boundary answers, on all ranks together.

SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGXCPU on any rank (Slurm sends SIGUSR1 with `--signal=B:USR1@300`, Grid Engine SIGUSR2
with `-notify`, the kernel SIGXCPU at the soft limit of CPU time) set a flag; the trainer adds the flags of all ranks to the one
all-reduce that every step makes anyway, so all ranks stop after the same step, save one checkpoint and exit with code 0. A second
signal (a SIGTERM after ECHO_SECONDS) stops at once, also a rank that waits in a collective for one that hangs: there
Python's own handlers never run, so a thread reads the signals. Before all ranks have joined SIGTERM and SIGINT stop at once.
SIGHUP, an ssh session that ends, is ignored: training goes on.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from data.terminal import say
from launch.cli import end_at_once

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
#: One request reaches a rank several times. Ctrl-C: as the terminal's SIGINT and as the DeepSpeed launcher's SIGTERM. SIGTERM to a
#: whole group (`timeout`, systemd, Slurm's end of a step, pdsh's `pkill`): its own, and its launcher's. Within this many seconds
#: another kind of signal, or one more SIGTERM, is the same request.
ECHO_SECONDS = 5.0


class StopRequest:
    """What asks this rank to stop: None, or the name of a signal or of the time limit."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._started = time.monotonic()
        self._deadline: float | None = None
        self._first: tuple[int, float] | None = None
        self._joined = False

    def install(self) -> StopRequest:
        """Take over the signals. Early, so that one that comes during start-up is not lost. See `joined`."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # not ignored: only then is the number written to the pipe
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that goes away takes no run along
        return self

    def after(self, max_hours: float) -> None:
        """Ask by the clock, this long after the process started; 0: never."""
        self._deadline = self._started + max_hours * 3600 if max_hours else None

    def joined(self) -> None:
        """All ranks are there. Until now SIGTERM and SIGINT ended this one: there was nothing to save, libraries load for long, and
        a rank that never comes would have the job hold its hosts for ten minutes more. The other signals announce an end that is
        minutes away."""
        self._joined = True

    def disarm(self) -> None:
        """All is saved: a launcher's late SIGTERM no longer turns exit code 0 into another."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _listen(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self._first is not None:
            first, when = self._first
            echoes = number != first or number == signal.SIGTERM
            if number == signal.SIGXCPU or (echoes and now - when < ECHO_SECONDS):
                return  # the kernel repeats SIGXCPU every second, until the hard limit kills
            try:
                say("second signal: stopping at once")
            finally:
                end_at_once(128 + number)
        self._first = (number, now)
        name = signal.Signals(number).name
        if not self._joined and number in (signal.SIGTERM, signal.SIGINT):
            try:
                _say_once(f"{name}: training has not begun, so there is nothing to save; stopping at once")
            finally:
                end_at_once(128 + number)
        later = f" after {ECHO_SECONDS:g} seconds" if number == signal.SIGTERM else ""
        _say_once(f"{name}: saving after this step; once more{later} stops at once")
        self.reason = name

    def requested(self) -> bool:
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "--max_hours"
        return self.reason is not None


def _say_once(text: str) -> None:
    """Rank 0 speaks for all: whoever signals a job signals each of its ranks."""
    if os.environ.get("RANK", "0") == "0":
        say(text)
