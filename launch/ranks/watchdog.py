"""Names the rank that hangs or dies, and ends the run: no collective can.

A thread on each rank writes the rank's step and phase to a store every two seconds; rank 0 reads all of them, the others
watch rank 0. A rank that falls silent (stopped, its host cut off) is named after `silence` seconds; a run in which no rank gets
anywhere is ended after `stall` seconds, naming the ranks that are behind; a rank that fails or dies is named within `PATIENCE`
seconds. Every rank then ends, so that the launcher or Slurm can start again; nothing waits for NCCL's or gloo's own timeout.
One rank alone has no store, and watches itself.

Time is what this process was awake for: a job that was suspended as a whole (a laptop's sleep, `scontrol suspend`) goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import NoReturn

from data.cli import Exit, sentence
from data.terminal import say
from launch.cli import end_at_once
from launch.ranks.heartbeat import Hang, Heartbeat, HeartbeatStore, LastWords, is_second_hand, listed

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 60.0
#: How long a failing rank waits to learn who was the first: two beats and a half tell a living rank from a dead one.
PATIENCE = 2.5 * BEAT_SECONDS
LAST_RESORT_SECONDS = 10.0
#: A wait that took so much longer than it should was spent asleep; less is a busy machine.
ASLEEP_SECONDS = 5.0


class AwakeClock:
    """Seconds that this process was awake. `wait` is how it learns of a sleep: whoever waits in a loop keeps it right."""

    def __init__(self) -> None:
        self._slept = 0.0
        self._woke = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._slept

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """`event.wait(seconds)`; True where it was set. One thread calls it, again and again, and does nothing long between."""
        is_set = event.wait(seconds)
        now = time.monotonic()
        late = now - self._woke - seconds
        if late > ASLEEP_SECONDS:
            self._slept += late
        self._woke = now
        return is_set

    def begin(self) -> None:
        """From here on `wait` is called in a loop."""
        self._woke = time.monotonic()

    @property
    def slept(self) -> float:
        return self._slept


class Watchdog:
    """`at(step, phase)` from the training thread; everything else happens in the watchdog's own threads."""

    def __init__(self, *, stall: float) -> None:
        self.stall, self.silence = stall, min(SILENCE_SECONDS, stall)
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._clock = AwakeClock()
        self._step, self._phase, self._moves, self._since = 0, "joining the other ranks", 0, self._clock()
        self._host, self._beats = socket.gethostname(), 0
        self._heard: dict[int, tuple[Heartbeat, float]] = {}
        #: Past the start: an error is no longer a mistake in the input.
        self.training = False
        self._done = threading.Event()
        self._store: HeartbeatStore | None = None
        self._store_answers = True
        self._answered = 0.0

    def at(self, step: int, phase: str) -> None:
        """This rank is now at `phase` of `step`."""
        if (step, phase) != (self._step, self._phase):  # what takes long says the same again: it has not stopped, nor come further
            self._moves = self._moves + 1 if step == self._step else 0
        self._step, self._phase, self._since = step, phase, self._clock()

    def phase(self, phase: str) -> None:
        """This rank is now at `phase` of the step it was at."""
        self.at(self._step, phase)

    def start(self) -> Watchdog:
        """Begin to watch. Collective, after `init_process_group`."""
        if self.world_size > 1:
            self._store = HeartbeatStore(self.rank, self.world_size, timeout=self.silence)
            self._store.write(self._heartbeat())
            self._answered = self._clock()
            # Two threads: over a link that is cut without a word the store's answer is waited for without end.
            threading.Thread(target=self._exchange, args=(self._store,), name="heartbeats", daemon=True).start()
        self._clock.begin()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def stop(self) -> None:
        """The run is over: silence from now on is no fault."""
        self._done.set()
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # rank 0 has closed the store: it is done as well
                self._store.write(self._heartbeat(done=True))

    # ------------------------------------------------------------------ a rank fails

    def report(self, error: BaseException) -> NoReturn:
        """Last words of a rank that fails; the last line names rank, step, phase and cause. Ends the process, with its threads."""
        with contextlib.suppress(ValueError):  # only the main thread may; the launcher's SIGTERM has nothing to add now
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        culprit = self.leave_last_words(error)
        if not is_second_hand(error) or not culprit:
            say("".join(traceback.format_exception(error)).rstrip())
            say(f"error: {culprit or f'rank {self.rank} failed at {self._heartbeat()}: {_cause(error)}'}")
        elif self._store is None or self._store.claim_host(self._host):
            say(f"error: {culprit}. This is rank {self.rank} at {self._heartbeat()}")
        end_at_once(Exit.STALLED if self._store is not None and self._store.hang else Exit.FAULT)

    def leave_last_words(self, error: BaseException) -> str:
        """Let the other ranks know why this one ends; returns who was the cause, as far as the ranks know together."""
        self._done.set()
        if self._store is None:
            return ""
        words = LastWords(place=str(self._heartbeat()), host=self._host, cause=_cause(error), second_hand=is_second_hand(error))
        return self._store.find_culprit(words, PATIENCE)

    def _heartbeat(self, *, done: bool = False) -> Heartbeat:
        return Heartbeat(
            step=self._step,
            phase=self._phase,
            host=self._host,
            beat=self._beats,
            moves=self._moves,
            seconds=self._clock() - self._since,
            done=done,
        )

    # ------------------------------------------------------------------ the watchdog's threads

    def _exchange(self, store: HeartbeatStore) -> None:
        """Write this rank's heartbeat and read the others', for as long as the run lasts."""
        while not self._done.wait(BEAT_SECONDS):
            self._beats += 1
            slept = self._clock.slept
            try:
                store.write(self._heartbeat())
                self._listen(store)
                self._answered = self._clock()
            except RuntimeError as error:
                # The training thread sees a closed connection within moments, and reports it.
                if not self._done.wait(PATIENCE + BEAT_SECONDS) and self._clock.slept == slept:
                    said = str(error).splitlines()[0][:120]
                    self._end(Hang(cause=f"rank 0 does not answer any more{self._last_of_rank0()} ({said})"))

    def _listen(self, store: HeartbeatStore) -> None:
        now = self._clock()
        for rank, heartbeat in store.read(Heartbeat, None if self.rank == 0 else (0,)).items():
            if rank != self.rank and (rank not in self._heard or heartbeat.beat != self._heard[rank][0].beat):
                self._heard[rank] = (heartbeat, now)
        if not store.has_alarm():
            return
        if hang := store.read_hang():
            self._end(hang, heard=True)
        failed = store.hear_failed(self._host)
        # A rank that has failed ends the run: whoever is not in a collective with it must not go on alone.
        if failed and not self._done.wait(PATIENCE):
            rank, words = min(failed.items())
            self._end(Hang(cause=f"rank {rank} failed at {words.place}: {words.cause}"), code=Exit.FAULT, heard=True)

    def _watch(self) -> None:
        while not self._clock.wait(self._done, BEAT_SECONDS):
            silent = self._clock() - self._answered
            if self._store is not None and silent > self.silence:
                self._store_answers = False  # nothing can be written there
                cause = f"rank 0 has not answered for {silent:.0f} s (stopped, or its host cut off){self._last_of_rank0()}"
                self._end(Hang(cause=cause, suspect=0))
            self._look_for_a_hang()

    def _look_for_a_hang(self) -> None:
        now = self._clock()
        living = {rank: beat for rank, beat in dict(self._heard).items() if not beat[0].done}  # the other thread adds to it
        for rank, (heartbeat, heard) in living.items():
            if now - heard > self.silence:
                self._end(Hang(cause=f"rank {rank} has been silent for {now - heard:.0f} s; last at {heartbeat}", suspect=rank))
        places = {self.rank: self._heartbeat(), **{rank: heartbeat for rank, (heartbeat, _) in living.items()}}
        if self.rank == 0 and all(place.seconds > self.stall for place in places.values()):
            # Who waits in a collective waits for someone who is not there: the culprit is behind.
            behind = sorted(places.items(), key=lambda item: (item[1].step, item[1].moves))
            where = listed([(rank, str(place)) for rank, place in behind])
            self._end(Hang(cause=f"no rank has moved for {self.stall:.0f} s: {where}", suspect=behind[0][0]))

    def _last_of_rank0(self) -> str:
        return f"; last at {self._heard[0][0]}" if 0 in self._heard else ""

    def _end(self, hang: Hang, *, code: int = Exit.STALLED, heard: bool = False) -> None:
        """`heard`: of another rank, as all of this host's have; one says it."""
        if self._done.is_set():
            return
        arm_last_resort(LAST_RESORT_SECONDS)
        # Two stacks are enough, the suspect's own (where it can still speak) and that of one who waits for it.
        if self.rank in (hang.suspect, 1 if hang.suspect == 0 else 0):
            say(f"\nthreads of rank {self.rank}:\n{stacks()}")
        if not heard or self._store is None or self._store.claim_host(self._host):
            say(f"error: {hang.cause}. This is rank {self.rank} at {self._heartbeat()}")
        if self._store is not None and self._store_answers:
            with contextlib.suppress(RuntimeError):
                self._store.claim_host(self._host)
                self._store.write(hang)
            if self.rank == 0:
                time.sleep(BEAT_SECONDS + 1)  # the others read it in the store, which goes with this process
        end_at_once(code)


def arm_last_resort(seconds: float) -> None:
    """End this process after so many seconds, whatever hangs in it and without a word, since saying is what may hang.

    A thread does it; should it never get the interpreter's lock, the kernel's alarm, which ends the process by SIGALRM.
    """
    timer = threading.Timer(seconds, os._exit, (Exit.STALLED,))
    timer.daemon = True
    timer.start()
    signal.setitimer(signal.ITIMER_REAL, seconds + 5)


def stacks() -> str:
    """Where every thread is. Not by `faulthandler`, which writes to a file and holds the interpreter while a full pipe makes it
    wait; and without source lines, whose file system may be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"Thread {ident:#018x} ({names.get(ident, 'unknown')}), innermost call first:")
        for each, line in traceback.walk_stack(frame):
            lines.append(f"  {each.f_code.co_filename}:{line} in {each.f_code.co_name}")
    return "\n".join(lines)


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {sentence(error)[:300]}"
