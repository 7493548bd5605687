"""Hangs have a culprit: every rank says where it is, and one that stops saying so is named by the others.

A thread on each rank writes the rank's step and phase to a board every two seconds; rank 0 reads all of them, the others
watch rank 0. A rank that falls silent (stopped, its host cut off) is named after `silence` seconds; a run in which no rank gets
anywhere is ended after `stall` seconds, naming the ranks that are behind; a rank that fails or dies is named within `PATIENCE`
seconds. Every rank then ends, so that the launcher or Slurm can start again; nothing waits for NCCL's or gloo's own timeout.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

from launch.bulletin import Board, Place, here, is_second_hand
from launch.distributed import EXIT_STALLED

EXIT_FAILED = 1
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 60.0
#: How long a failing rank waits to learn who was the first: two beats and a half tell a living rank from a dead one.
PATIENCE = 2.5 * BEAT_SECONDS
LAST_RESORT_SECONDS = 10.0
#: For tests: RANK/STEP/PHASE in this variable stops (SIGSTOP) that rank when it comes there, so that a fault can strike it there.
PAUSE_AT = "MOE_PAUSE_AT"


class Watchdog:
    """`at(step, phase)` from the training thread; everything else happens in the watchdog's own thread."""

    def __init__(self, *, stall: float, silence: float | None = None, beat: float = BEAT_SECONDS) -> None:
        self.stall, self.beat = stall, beat
        self.silence = min(SILENCE_SECONDS, stall) if silence is None else silence
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._step, self._phase, self._moves, self._since = 0, "joining the other ranks", 0, time.monotonic()
        self._host, self._beats = here(), 0
        self._heard: dict[int, tuple[Place, float]] = {}
        #: Past the start: an error is no longer a mistake in the input.
        self.training = False
        self._done = threading.Event()
        self._board: Board | None = None
        self._answered = 0.0
        self._pause_at = os.environ.get(PAUSE_AT)

    def at(self, step: int, phase: str) -> None:
        """This rank is now at `phase` of `step`."""
        self._moves = self._moves + 1 if step == self._step else 0
        self._step, self._phase, self._since = step, phase, time.monotonic()
        if self._pause_at is not None and f"{self.rank}/{step}/{phase}".startswith(self._pause_at):
            self._pause_at = None
            os.write(2, f"rank {self.rank} pauses at step {step}, {phase}\n".encode())
            os.kill(os.getpid(), signal.SIGSTOP)

    def phase(self, phase: str) -> None:
        """This rank is now at `phase` of the step it was at."""
        self.at(self._step, phase)

    def start(self) -> Watchdog:
        """Begin to watch. Collective, after `init_process_group`."""
        if self.world_size > 1:
            self._board = Board(self.rank, self.world_size, timeout=self.silence)
            self._board.write("place", self._place())
            self._answered = time.monotonic()
            # Two threads: over a link that is cut without a word the store's answer is waited for without end.
            threading.Thread(target=self._exchange, name="watchdog: board", daemon=True).start()
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        return self

    def stop(self) -> None:
        """The run is over: silence from now on is no fault."""
        self._done.set()
        if self._board is not None:
            with contextlib.suppress(RuntimeError):  # rank 0 has closed the board: it is done as well
                self._board.write("place", self._place(beat=-1))

    # ------------------------------------------------------------------ a rank fails

    def report(self, error: BaseException) -> NoReturn:
        """Last words of a rank that fails; the last line names rank, step, phase and cause. Ends the process, with its threads."""
        with contextlib.suppress(ValueError):  # only the main thread may; the launcher's SIGTERM has nothing to add now
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        culprit = self.tell(error)
        if not is_second_hand(error) or not culprit:
            traceback.print_exception(error)
            own = f"rank {self.rank} failed at {self._place()}: {_sentence(error)}"
            print(f"error: {culprit or own}", file=sys.stderr, flush=True)
        elif self._board is None or self._board.first_on_host(self._host):
            print(f"error: {culprit}. This is rank {self.rank} at {self._place()}", file=sys.stderr, flush=True)
        os._exit(EXIT_STALLED if self._board is not None and self._board.verdict else EXIT_FAILED)

    def tell(self, error: BaseException) -> str:
        """Let the other ranks know why this one ends; returns who was the cause, as far as the ranks know together."""
        self._done.set()
        if self._board is None:
            return ""
        words = self._place(cause=_sentence(error), second_hand=is_second_hand(error))
        return self._board.post_mortem(words, PATIENCE)

    def _place(self, **more: object) -> Place:
        seconds = time.monotonic() - self._since
        return Place(
            **{
                "step": self._step,
                "phase": self._phase,
                "host": self._host,
                "beat": self._beats,
                "moves": self._moves,
                "seconds": seconds,
                **more,
            }
        )

    # ------------------------------------------------------------------ the watchdog's thread

    def _run(self) -> None:
        while not self._done.wait(self.beat):
            silent = time.monotonic() - self._answered
            if silent > self.silence:
                last = f"; last at {self._heard[0][0]}" if 0 in self._heard else ""
                cause = f"rank 0 has not answered for {silent:.0f} s (stopped, or its host cut off){last}"
                self._board = None  # nothing can be written there
                self._end(cause, suspect=0)
            self._judge()

    def _exchange(self) -> None:
        assert self._board is not None
        while not self._done.wait(self.beat):
            self._beats += 1
            try:
                self._board.write("place", self._place())
                self._listen(self._board)
                self._answered = time.monotonic()
            except RuntimeError as error:
                # The training thread sees a closed connection within moments, and reports it.
                if not self._done.wait(PATIENCE + self.beat):
                    last = f"; last at {self._heard[0][0]}" if 0 in self._heard else ""
                    self._end(f"rank 0 does not answer any more{last} ({str(error).splitlines()[0][:120]})")

    def _listen(self, board: Board) -> None:
        now = time.monotonic()
        for rank, place in board.read("place", None if self.rank == 0 else (0,)).items():
            if rank != self.rank and (rank not in self._heard or place.beat != self._heard[rank][0].beat):
                self._heard[rank] = (place, now)
        if not board.alarm():
            return
        if verdict := board.read_verdict():
            self._end(verdict.cause, suspect=verdict.suspect)
        failed = {rank: words for rank, words in board.read("failed").items() if not words.second_hand}
        # A rank that has failed ends the run: whoever is not in a collective with it must not go on alone.
        if failed and not self._done.wait(PATIENCE):
            rank, words = min(failed.items())
            self._end(f"rank {rank} failed at {words}: {words.cause}", code=EXIT_FAILED)

    def _judge(self) -> None:
        now = time.monotonic()
        heard_so_far = dict(self._heard)  # the other thread adds to it
        for rank, (place, heard) in heard_so_far.items():
            if place.beat >= 0 and now - heard > self.silence:
                self._end(f"rank {rank} has been silent for {now - heard:.0f} s; last at {place}", suspect=rank)
        others = {rank: place for rank, (place, _) in heard_so_far.items() if place.beat >= 0}
        mine = self._place()
        if self.rank == 0 and mine.seconds > self.stall and all(place.seconds > self.stall for place in others.values()):
            # Who waits in a collective waits for someone who is not there: the culprit is behind.
            places = sorted({**others, self.rank: mine}.items(), key=lambda item: (item[1].step, item[1].moves))
            listed = "; ".join(f"rank {rank} at {place}" for rank, place in places)
            self._end(f"no rank has moved for {self.stall:.0f} s: {listed}", suspect=places[0][0])

    def _end(self, cause: str, *, suspect: int | None = None, code: int = EXIT_STALLED) -> None:
        if self._done.is_set():
            return
        # What is said below goes to a pipe and to a store that may be stuck as well; the end must come all the same, by a thread
        # in C that needs no interpreter lock (its exit code is 1).
        faulthandler.dump_traceback_later(LAST_RESORT_SECONDS, exit=True)
        sys.stderr.flush()
        # Two stacks are enough, the suspect's own (where it can still speak) and that of one who waits for it.
        if self.rank in (suspect, 1 if suspect == 0 else 0):
            print(f"\nthreads of rank {self.rank}:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        print(f"error: {cause}. This is rank {self.rank} at {self._place()}", file=sys.stderr, flush=True)
        if self._board is not None:
            with contextlib.suppress(RuntimeError):
                self._board.write("verdict", self._place(cause=cause, suspect=suspect))
            if self.rank == 0:
                time.sleep(self.beat + 1)  # the others read the verdict on the board, which goes with this process
        os._exit(code)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
