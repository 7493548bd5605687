"""What the ranks let each other know: a key-value store beside the process group, and who was at fault by what stands there.

A collective that fails says "connection closed by peer", on every rank but the one that could say why. So each rank leaves its
heartbeats in a store that outlives the collective, a failing rank its last words, and the others read there whom to name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from launch.cli import RankFailedError

#: What a rank says whose peer is gone. Its own failure is a consequence, not the cause.
SECOND_HAND = re.compile(
    r"(?i)gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|tcpstore|timed out|all_?reduce|all_?to_?all"
)
#: Ranks that are listed with their places; of more only how many there are.
MOST_LISTED = 8
#: Keys of the store that no rank has for itself: a watchdog's finding, and who was at fault by what the ranks had left.
HANG, CULPRIT = "hang", "culprit"


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Where a rank is. `beat` counts up while it lives; `seconds`: since it came to this phase; `moves`: phases of the step before
    this one; `done`: it has finished, and its silence from now on is no fault."""

    step: int
    phase: str
    host: str
    beat: int = 0
    seconds: float = 0.0
    moves: int = 0
    done: bool = False

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase} (host {self.host})"


@dataclass(frozen=True, kw_only=True)
class LastWords:
    """Why a rank ends, and where it was. `second_hand`: only because another one was gone."""

    place: str
    host: str
    cause: str
    second_hand: bool = False


@dataclass(frozen=True, kw_only=True)
class Hang:
    """What a watchdog ends the run for, and the rank it suspects."""

    cause: str
    suspect: int | None = None


Message = TypeVar("Message", Heartbeat, LastWords)
#: Of which each rank has one.
KINDS: tuple[type[Heartbeat | LastWords], ...] = (Heartbeat, LastWords)


def is_second_hand(error: BaseException) -> bool:
    """Did this rank fail because another was gone?"""
    text = str(error)
    if "out of memory" in text.lower() and not isinstance(error, RankFailedError):
        return False  # also where it is NCCL that finds no memory: that is this rank's own trouble
    if isinstance(error, (dist.DistError, RankFailedError)):
        return True
    return isinstance(error, RuntimeError) and bool(SECOND_HAND.search(text))


def listed(places: Sequence[tuple[int, str]]) -> str:
    """Ranks and where they are, the first few in full: a line of 512 would be 40 kB."""
    said = "; ".join(f"rank {rank} at {place}" for rank, place in places[:MOST_LISTED])
    return said + (f"; and {len(places) - MOST_LISTED} more" if len(places) > MOST_LISTED else "")


def name_culprit(heartbeats: dict[int, Heartbeat], failed: dict[int, LastWords], silent: set[int]) -> str:
    """Who ended the run: a rank with a cause of its own, else one that went without a word. "" where nobody knows.

    `heartbeats`: the last one of each rank; `silent`: ranks whose heartbeat has stopped.
    """
    own = {rank: words for rank, words in failed.items() if not words.second_hand}
    if own:
        rank = min(own)
        others = f" (ranks {', '.join(map(str, sorted(own)))} failed likewise)" if len(own) > 1 else ""
        return f"rank {rank} failed at {own[rank].place}: {own[rank].cause}{others}"
    gone = sorted(rank for rank in silent if rank not in failed)
    if gone:
        said = listed([(rank, str(heartbeats[rank]) if rank in heartbeats else "start-up") for rank in gone])
        return f"died without a word (killed, out of memory, or cut off from the network): {said}"
    return ""


class HeartbeatStore:
    """Construct it on all ranks together, after `init_process_group`; rank 0 keeps it. Every method raises RuntimeError where
    rank 0 is gone.

    One thread answers all ranks, some 12 us for a question: of 512 ranks that each ask about each other, once for every message,
    the last would be answered after 20 s. So a rank asks for all messages at once, and what one rank has found the others read.
    """

    def __init__(self, rank: int, world_size: int, *, timeout: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.hang: Hang | None = None  # once `read_hang` has found one
        self._failed: dict[int, LastWords] = {}  # as heard last: rank 0 takes the store along
        self._speaks: bool | None = None  # for its host, once `claim_host` was asked
        self._claiming = threading.Lock()
        # A store of its own: the process group's blocks while the training thread waits in it.
        address: list[Any] = [None]
        if rank == 0:
            self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
            self._lay_out()
            address = [(os.environ.get("MASTER_ADDR", "127.0.0.1"), self._store.port)]
        dist.broadcast_object_list(address, src=0)
        if rank:
            host, port = address[0]
            self._store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))

    def _lay_out(self) -> None:
        """Every message, empty: the store makes whoever asks for one that is not there wait for it."""
        keys = [HANG, CULPRIT, *(_key(kind, rank) for kind in KINDS for rank in range(self.world_size))]
        self._store.multi_set(keys, [""] * len(keys))  # type: ignore[attr-defined]  # torch's stub lacks it

    def write(self, message: Heartbeat | LastWords | Hang) -> None:
        """Leave this rank's newest message of its kind; of hangs the first that any rank has found stays."""
        text = json.dumps(asdict(message))
        if isinstance(message, Hang):
            self._store.compare_set(HANG, "", text)
        else:
            self._store.set(_key(type(message), self.rank), text)
        if not isinstance(message, Heartbeat):
            self._store.set("alarm", "")

    def read(self, kind: type[Message], ranks: Sequence[int] | None = None) -> dict[int, Message]:
        """What these ranks (None: all, this one included) have left of a kind."""
        ranks = range(self.world_size) if ranks is None else ranks
        texts = self._store.multi_get([_key(kind, rank) for rank in ranks])
        return {rank: kind(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True) if text}

    def hear_failed(self, host: str) -> dict[int, LastWords]:
        """The ranks that have failed by themselves. Where there is one, this rank of `host` needs the store no more."""
        self._failed = self.read(LastWords)
        own = {rank: words for rank, words in self._failed.items() if not words.second_hand}
        if own:
            self.claim_host(host)
            self._store.set(f"left_{self.rank}", "")
        return own

    def has_alarm(self) -> bool:
        """Has any rank left last words or found a hang? One question, however many ranks there are."""
        return bool(self._store.check(["alarm"]))

    def read_hang(self) -> Hang | None:
        """What the watchdog of some rank ends the run for."""
        text = self._store.get(HANG)
        self.hang = Hang(**json.loads(text)) if text else None
        return self.hang

    def find_culprit(self, words: LastWords, patience: float) -> str:
        """Leave this rank's last words, hear the others', and name who ended the run. Takes `patience` seconds at most, and rank 0
        as many more."""
        try:
            self.write(words)
            culprit, others = self._hear(words, time.monotonic() + patience)
            self.claim_host(words.host)  # before rank 0 takes the store along
        except RuntimeError:
            known = self._failed if words.second_hand else {self.rank: words}
            culprit = name_culprit({}, known, set())
            if culprit or 0 in known:
                return culprit
            return "rank 0 is gone without a word, and with it what the ranks knew of each other"
        self._leave_together(others, time.monotonic() + patience)
        return culprit

    def _hear(self, words: LastWords, until: float) -> tuple[str, set[int]]:
        """Who ended the run, and which ranks will still want to know. Rank 0 looks for it, and who has a cause of its own; the
        others read what those found, and look for themselves when that has not come in time."""
        looks, first = self.rank == 0 or not words.second_hand, self.read(Heartbeat)
        while True:
            late = time.monotonic() > until
            if not looks and (said := self._found()) is not None:
                return said, set()
            if looks or late:
                culprit, others, known = self._judge(first, late=late)
                if known or late:
                    if known or culprit:
                        self._store.set(CULPRIT, json.dumps(culprit))  # the store refuses the name of a file that is no UTF-8
                    return culprit, others
            time.sleep(0.1)

    def _found(self) -> str | None:
        """What another rank has found out ("": that nobody knows); None where none has yet."""
        if hang := self.read_hang():
            return hang.cause
        said = self._store.get(CULPRIT)
        return str(json.loads(said)) if said else None

    def _judge(self, first: dict[int, Heartbeat], *, late: bool) -> tuple[str, set[int], bool]:
        """Who ended the run by what stands in the store, who is still there, and whether that is all there is to know. `late`: time
        enough since `first` for a heartbeat of everyone who lives."""
        everyone = set(range(self.world_size))
        self._failed = failed = self.read(LastWords)
        now, hang = self.read(Heartbeat), self.read_hang()
        done = {rank for rank, heartbeat in now.items() if heartbeat.done}
        silent = {r for r in everyone if late and r in first and now[r].beat == first[r].beat} - done
        waiting = everyone - failed.keys() - done
        known = hang is not None or any(not words.second_hand for words in failed.values()) or not waiting
        return hang.cause if hang else name_culprit(now, failed, silent), failed.keys() | waiting - silent, known

    def _leave_together(self, ranks: set[int], until: float) -> None:
        """Rank 0 takes the store along when it goes: it waits for those who still read."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left_{self.rank}", "")
            while self.rank == 0 and time.monotonic() < until:
                if self._store.check([f"left_{rank}" for rank in sorted(ranks)]):
                    return
                time.sleep(0.05)

    def claim_host(self, host: str) -> bool:
        """Is this the first rank of its host to ask, whose word is enough for all of them? True where nobody can say. The same
        whenever it is asked."""
        with self._claiming:
            if self._speaks is None:
                try:
                    self._speaks = bool(self._store.add(f"speaks_on_{host}", 1) == 1)
                except RuntimeError:
                    self._speaks = True
            return self._speaks


def _key(kind: type[Heartbeat | LastWords], rank: int) -> str:
    return f"{kind.__name__}_{rank}"
