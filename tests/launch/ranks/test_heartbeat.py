"""Who was at fault: the pure judgement (two processes that lose each other are in tests/faults)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from launch.cli import RankFailedError
from launch.ranks.heartbeat import CULPRIT, Hang, Heartbeat, HeartbeatStore, LastWords, is_second_hand, name_culprit


def at(step: int, phase: str = "forward") -> Heartbeat:
    return Heartbeat(step=step, phase=phase, host="h")


def words(place: Heartbeat, cause: str, *, second_hand: bool = False) -> LastWords:
    return LastWords(place=str(place), host="h", cause=cause, second_hand=second_hand)


def test_a_cause_of_its_own_comes_before_a_consequence() -> None:
    failed = {
        0: words(at(5), "RuntimeError: Connection closed by peer", second_hand=True),
        2: words(at(4, "saving"), "OSError: disk"),
    }
    said = name_culprit({r: at(5) for r in range(4)}, failed, silent={3})
    assert said == "rank 2 failed at step 4, saving (host h): OSError: disk"


def test_several_causes_name_the_lowest_and_list_all() -> None:
    failed = {r: words(at(1), f"ValueError: {r}") for r in (1, 3)}
    assert (
        name_culprit({}, failed, set()) == "rank 1 failed at step 1, forward (host h): ValueError: 1 (ranks 1, 3 failed likewise)"
    )


def test_without_words_the_silent_one_is_named_with_its_place() -> None:
    failed = {0: words(at(5), "RuntimeError: gloo", second_hand=True)}
    said = name_culprit({0: at(5), 1: at(4, "loading data"), 2: at(5)}, failed, silent={0, 1})
    assert said.startswith("died without a word") and said.endswith("rank 1 at step 4, loading data (host h)")


def test_nobody_knows() -> None:
    assert name_culprit({0: at(5), 1: at(5)}, {0: words(at(5), "", second_hand=True)}, silent=set()) == ""


def test_of_many_silent_ranks_a_few_are_listed_and_the_others_counted() -> None:
    said = name_culprit({r: at(4) for r in range(512)}, {}, silent=set(range(512)))
    assert said.count("rank ") == 8 and said.endswith("rank 7 at step 4, forward (host h); and 504 more")
    assert name_culprit({r: at(4) for r in range(8)}, {}, silent=set(range(8))).endswith("rank 7 at step 4, forward (host h)")


class Keys(dict):
    """As much of a TCPStore as is asked, and how often it was."""

    asked = 0

    def set(self, key: str, value: str) -> None:
        self.asked += 1
        self[key] = value.encode()

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        self.update(zip(keys, map(str.encode, values), strict=True))

    def compare_set(self, key: str, expected: str, value: str) -> None:
        if self[key] == expected.encode():
            self.set(key, value)

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        return all(key in self for key in keys)

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.asked += 1
        return [self[key] for key in keys]  # where the real one waits for a key that is not there, this raises

    def add(self, key: str, amount: int) -> int:
        self.asked += 1
        self[key] = super().get(key, 0) + amount
        return self[key]


def stores(world_size: int) -> tuple[Keys, list[HeartbeatStore]]:
    """Each with a first heartbeat in it."""
    keys, made = Keys(), [object.__new__(HeartbeatStore) for _ in range(world_size)]
    for rank, store in enumerate(made):
        own = {"_failed": {}, "_speaks": None, "_claiming": threading.Lock()}
        vars(store).update(rank=rank, world_size=world_size, hang=None, _store=keys, **own)
    made[0]._lay_out()
    for store in made:
        store.write(at(9))
    return keys, made


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Time passes in sleeps alone; in each of them all that is in this list is called."""
    clock, meanwhile = [0.0], list[Callable[[], None]]()

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        for call in meanwhile[:]:
            call()

    monkeypatch.setattr("launch.ranks.heartbeat.time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    return meanwhile


GLOO = words(at(9), "RuntimeError: gloo", second_hand=True)


def test_a_rank_that_has_finished_is_no_culprit_and_is_not_waited_for(sleeps: list) -> None:
    _, (first, finished) = stores(2)
    finished.write(Heartbeat(step=9, phase="done", host="h", done=True))
    sleeps.append(lambda: pytest.fail("waited"))
    assert first.find_culprit(GLOO, 0.2) == ""


def test_one_of_many_ranks_looks_and_the_others_read_what_it_found(sleeps: list) -> None:
    """With a look through all messages by each of 512 ranks the store's one thread is behind by more than a rank's patience. What
    rank 0 finds as its patience ends is read by the others before it goes, and with it the store."""
    keys, ranks = stores(512)
    said, asked = dict[int, str](), dict[int, int]()
    silent = "died without a word (killed, out of memory, or cut off from the network): rank 7 at step 9, forward (host h)"

    def others() -> None:
        for store in ranks[1:]:
            if store.rank != 7 and store.rank not in said and keys[CULPRIT]:
                before = keys.asked
                said[store.rank] = store.find_culprit(GLOO, 5.0)
                asked[store.rank] = keys.asked - before

    def alive() -> None:
        for store in ranks[1:7] + ranks[8:]:
            keys[f"Heartbeat_{store.rank}"] = json.dumps({**vars(at(9)), "beat": 1}).encode()

    sleeps += [alive, others]
    assert ranks[0].find_culprit(GLOO, 5.0) == silent
    assert keys.asked - sum(asked.values()) < 1000, "not one question for every message, again and again"
    assert said == dict.fromkeys({*range(1, 512)} - {7}, silent)
    assert max(asked.values()) < 10
    assert [store._speaks for store in ranks].count(True) == 1 and ranks[7]._speaks is None, "and rank 7 is gone"


def test_whose_own_fault_it_was_is_said_at_once(sleeps: list) -> None:
    """And over what others took it for."""
    keys, ranks = stores(3)
    keys.set(CULPRIT, json.dumps("died without a word"))
    sleeps.append(lambda: pytest.fail("waited"))
    named = "rank 2 failed at step 4, saving (host h): OSError: disk"
    assert ranks[2].find_culprit(words(at(4, "saving"), "OSError: disk"), 5.0) == named
    assert ranks[1].find_culprit(GLOO, 5.0) == named
    assert ranks[0].find_culprit(GLOO, 5.0) == named


def test_where_nobody_was_the_cause_the_ranks_agree_at_once(sleeps: list) -> None:
    """A network that fails all of them. Each waited for its patience, and the last found rank 0 gone "without a word"."""
    _, ranks = stores(3)
    said = dict[int, str]()

    def others() -> None:
        for store in ranks[1:]:
            store.write(GLOO)  # here, and not yet asking
        sleeps[:] = [ask]

    def ask() -> None:
        sleeps[:] = [lambda: pytest.fail("waited")]
        for store in ranks[1:]:
            said[store.rank] = store.find_culprit(GLOO, 5.0)

    sleeps.append(others)
    assert ranks[0].find_culprit(GLOO, 5.0) == "" and said == {1: "", 2: ""}


class Gone:
    """A store whose rank 0 has left."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise RuntimeError("Connection reset by peer")


def test_rank_0_leaves_when_all_have_heard_why(sleeps: list) -> None:
    """It took the store along at once, and the last lines of the log were that it was gone without a word."""
    _, ranks = stores(3)
    named = "rank 0 failed at step 4, saving (host h): OSError: disk"
    heard = list[int]()

    def listen() -> None:
        rank = len(heard) + 1
        assert list(ranks[rank].hear_failed("h")) == [0]
        heard.append(rank)

    sleeps.append(listen)
    assert ranks[0].find_culprit(words(at(4, "saving"), "OSError: disk"), 5.0) == named and heard == [1, 2]
    for store in ranks[1:]:
        store._store = Gone()  # type: ignore[assignment]
        assert store.find_culprit(GLOO, 5.0) == named and not store.claim_host("h")
    _, (_, alone) = stores(2)
    alone._store = Gone()  # type: ignore[assignment]
    assert alone.find_culprit(GLOO, 5.0).startswith("rank 0 is gone without a word") and alone.claim_host("h")


def test_without_a_word_from_rank_0_a_rank_looks_for_itself(sleeps: list) -> None:
    """It waits in a collective with others, and has not failed."""
    keys, ranks = stores(3)
    sleeps.append(lambda: keys.__setitem__("Heartbeat_0", json.dumps({**vars(at(9)), "beat": 1}).encode()))
    assert ranks[1].find_culprit(GLOO, 5.0).endswith("rank 2 at step 9, forward (host h)")


def test_a_hang_is_what_the_first_to_find_one_says(sleeps: list) -> None:
    """At once: rank 0 goes three seconds after it, and whoever heard of it ends with the code of a hang."""
    _, ranks = stores(2)
    assert ranks[0].read_hang() is None and not ranks[0].has_alarm()
    ranks[1].write(Hang(cause="silent", suspect=0))
    ranks[0].write(Hang(cause="nothing moves", suspect=1))
    assert ranks[0].has_alarm() and ranks[0].read_hang() == ranks[0].hang == Hang(cause="silent", suspect=0)
    sleeps.append(lambda: pytest.fail("waited"))
    assert ranks[1].find_culprit(GLOO, 5.0) == "silent" and ranks[1].hang == ranks[0].hang


def test_the_store_of_rank_0_answers_what_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one: what no rank has left yet is empty, and nobody waits for it."""
    monkeypatch.setattr("launch.ranks.heartbeat.dist.broadcast_object_list", lambda *_, **__: None)
    store = HeartbeatStore(0, 2, timeout=60)
    store.write(at(9))
    assert store.read(Heartbeat) == {0: at(9)} and store.read(LastWords) == {} and store.read_hang() is None
    store.write(Hang(cause="nothing moves"))
    store.write(Hang(cause="silent"))
    assert store.read_hang() == Hang(cause="nothing moves")
    assert store.find_culprit(GLOO, 0.0) == "nothing moves"
    assert store.claim_host("h") and store.claim_host("h"), "the same answer"
    store._speaks = None
    assert not store.claim_host("h")


def test_a_cause_may_name_a_file_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store takes UTF-8 alone; every rank ended in its refusal in the place of the cause."""
    monkeypatch.setattr("launch.ranks.heartbeat.dist.broadcast_object_list", lambda *_, **__: None)
    store, cause = HeartbeatStore(0, 1, timeout=60), "UserError: /data/caf\udce9/00001.bin is cut"
    named = f"rank 0 failed at step 4, saving (host h): {cause}"
    assert store.find_culprit(words(at(4, "saving"), cause), 5.0) == named
    assert store._found() == named


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:3"),
            True,
        ),
        (RuntimeError("[1] is setting up NCCL communicator and retrieving ncclUniqueId failed"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (RankFailedError("rank 1 failed: KeyError: 'weights'"), True),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("gloo"), False),
    ],
)
def test_second_hand(error: BaseException, expected: bool) -> None:
    assert is_second_hand(error) == expected
