"""Who was at fault: the pure judgement (two processes that lose each other are in tests/faults)."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from launch.cli import RankFailedError
from launch.ranks.heartbeat import Heartbeat, HeartbeatStore, LastWords, is_second_hand, name_culprit


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
    """As much of a TCPStore as is asked."""

    set = dict.__setitem__

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_a_rank_that_has_finished_is_no_culprit_and_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, waits = Keys(), list[float]()
    first, finished = (object.__new__(HeartbeatStore) for _ in range(2))
    for rank, store in enumerate((first, finished)):
        vars(store).update(rank=rank, world_size=2, hang=None, _store=keys)
    first.write(at(9))
    finished.write(Heartbeat(step=9, phase="done", host="h", done=True))
    monkeypatch.setattr("launch.ranks.heartbeat.time.sleep", waits.append)
    assert first.find_culprit(words(at(9), "RuntimeError: gloo", second_hand=True), 0.2) == "" and not waits


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
