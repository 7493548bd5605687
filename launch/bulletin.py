"""Where ranks write what becomes of them: a key-value store beside the process group, and who was at fault by what it says.

A collective that fails says "connection closed by peer", on every rank but the one that could say why. So each rank keeps its
place on a board that outlives the collective, a failing rank adds its cause, and the others read there whom to name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

#: What a rank says whose peer is gone. Its own failure is a consequence, not the cause.
SECOND_HAND = re.compile(
    r"(?i)gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|tcpstore|timed out|all_?reduce|all_?to_?all"
)
#: What makes every rank look closer.
ALARMING = ("verdict", "failed")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is. `beat` counts up while it lives, -1 once it is done; `seconds`: since it came to this phase; `moves`: phases
    of the step before this one. In a verdict, `cause` is why the run ends and `suspect` the rank it ends for."""

    step: int
    phase: str
    host: str
    beat: int = 0
    seconds: float = 0.0
    moves: int = 0
    cause: str = ""
    suspect: int | None = None
    second_hand: bool = False

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase} (host {self.host})"


def is_second_hand(error: BaseException) -> bool:
    """Did this rank fail because another was gone?"""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(SECOND_HAND.search(str(error))))


def name_culprit(places: dict[int, Place], failed: dict[int, Place], silent: set[int]) -> str:
    """Who ended the run: a rank with a cause of its own, else one that went without a word. "" where nobody knows.

    `places`: the last known place of each rank; `failed`: the last words; `silent`: ranks whose beat has stopped.
    """
    own = {rank: words for rank, words in failed.items() if not words.second_hand}
    if own:
        rank = min(own)
        others = f" (ranks {', '.join(map(str, sorted(own)))} failed likewise)" if len(own) > 1 else ""
        return f"rank {rank} failed at {own[rank]}: {own[rank].cause}{others}"
    gone = sorted(rank for rank in silent if rank not in failed)
    said = "; ".join(f"rank {r} at {places[r]}" if r in places else f"rank {r} at start-up" for r in gone)
    if gone:
        return f"died without a word (killed, out of memory, or cut off from the network): {said}"
    return ""


class Board:
    """The store. Construct it on all ranks together, after `init_process_group`; rank 0 keeps it."""

    def __init__(self, rank: int, world_size: int, *, timeout: float) -> None:
        self.rank, self.world_size = rank, world_size
        # A store of its own: the process group's blocks while the training thread waits in it.
        address: list[Any] = [None]
        if rank == 0:
            self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
            address = [(os.environ.get("MASTER_ADDR", "127.0.0.1"), self._store.port)]
        dist.broadcast_object_list(address, src=0)
        if rank:
            host, port = address[0]
            self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
        #: What a watchdog found and ended the run for, once a rank has written it.
        self.verdict: Place | None = None

    def write(self, kind: str, place: Place | None = None) -> None:
        """Errors: `RuntimeError` where rank 0 is gone."""
        self._store.set(f"{kind}_{self.rank}", json.dumps(asdict(place) if place else None))
        if kind in ALARMING:
            self._store.set("alarm", "")

    def alarm(self) -> bool:
        """Has any rank written a verdict or last words? One question, however many ranks there are. Errors as in `write`."""
        return self._store.check(["alarm"])

    def read(self, kind: str, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """What these ranks (None: all) have written under `kind`, this one included. Errors as in `write`."""
        found = {}
        for rank in range(self.world_size) if ranks is None else ranks:
            key = f"{kind}_{rank}"
            if self._store.check([key]):  # `get` would wait for it
                value = json.loads(self._store.get(key))
                found[rank] = Place(**value) if value else None
        return found

    def read_verdict(self) -> Place | None:
        """What some rank's watchdog ends the run for, None while there is nothing. Errors as in `write`."""
        found = self.read("verdict")
        self.verdict = found[min(found)] if found else None
        return self.verdict

    def post_mortem(self, words: Place, patience: float) -> str:
        """Write this rank's last words, hear the others', and name who ended the run. Takes `patience` seconds at most."""
        until = time.monotonic() + patience
        try:
            self.write("failed", words)
            first = self.read("place")
            while True:
                failed, places = self.read("failed"), self.read("place")
                done = {r for r, p in places.items() if p.beat < 0}
                silent = {r for r in range(self.world_size) if r in first and places[r].beat == first[r].beat} - done
                waiting = set(range(self.world_size)) - failed.keys() - done
                verdict = self.read_verdict()
                culprit = verdict.cause if verdict else name_culprit(places, failed, silent)
                settled = verdict or any(not w.second_hand for w in failed.values()) or not waiting
                if settled or time.monotonic() > until:
                    break
                time.sleep(0.1)
        except RuntimeError:
            words_of_own = "" if words.second_hand else f"rank {self.rank} failed at {words}: {words.cause}"
            return words_of_own or "rank 0 is gone without a word, and with it what the ranks knew of each other"
        self._leave_together(failed.keys() | waiting - silent, until)
        return culprit

    def _leave_together(self, ranks: set[int], until: float) -> None:
        """Rank 0 takes the board along when it goes: it waits for those who still read."""
        with contextlib.suppress(RuntimeError):
            self.write("left")
            while self.rank == 0 and ranks - self.read("left").keys() and time.monotonic() < until:
                time.sleep(0.05)

    def first_on_host(self, host: str) -> bool:
        """Is this the lowest of the ranks on its host that have left words? One line a host is enough."""
        try:
            return self.rank == min(r for r, p in self.read("failed").items() if p.host == host)
        except (RuntimeError, ValueError):
            return True


def here() -> str:
    return socket.gethostname()
