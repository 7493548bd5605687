"""Who was at fault: the pure judgement, and two processes that lose each other (the whole of it is in tests/faults)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch.distributed as dist
from support import ROOT

from launch.bulletin import Place, is_second_hand, name_culprit


def at(step: int, phase: str = "forward", **more: object) -> Place:
    return Place(**{"step": step, "phase": phase, "host": "h", **more})


def test_a_cause_of_its_own_comes_before_a_consequence() -> None:
    failed = {
        0: at(5, cause="RuntimeError: Connection closed by peer", second_hand=True),
        2: at(4, "saving", cause="OSError: disk"),
    }
    said = name_culprit({r: at(5) for r in range(4)}, failed, silent={3})
    assert said == "rank 2 failed at step 4, saving (host h): OSError: disk"


def test_several_causes_name_the_lowest_and_list_all() -> None:
    failed = {r: at(1, cause=f"ValueError: {r}") for r in (1, 3)}
    assert (
        name_culprit({}, failed, set()) == "rank 1 failed at step 1, forward (host h): ValueError: 1 (ranks 1, 3 failed likewise)"
    )


def test_without_words_the_silent_one_is_named_with_its_place() -> None:
    failed = {0: at(5, cause="RuntimeError: gloo", second_hand=True)}
    said = name_culprit({0: at(5), 1: at(4, "loading data"), 2: at(5)}, failed, silent={0, 1})
    assert said.startswith("died without a word") and said.endswith("rank 1 at step 4, loading data (host h)")


def test_nobody_knows() -> None:
    assert name_culprit({0: at(5), 1: at(5)}, {0: at(5, second_hand=True)}, silent=set()) == ""


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:3"),
            True,
        ),
        (RuntimeError("[1] is setting up NCCL communicator and retrieving ncclUniqueId failed"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("gloo"), False),
    ],
)
def test_second_hand(error: BaseException, expected: bool) -> None:
    assert is_second_hand(error) == expected


def test_a_store_that_is_stuck_does_not_keep_a_rank_alive() -> None:
    program = """
import time
from launch import watchdog
watchdog.LAST_RESORT_SECONDS = 1.0
dog = watchdog.Watchdog(stall=5)
dog._board = type("Stuck", (), {"write": lambda *_: time.sleep(60)})()
dog._end("nothing moves", suspect=1)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 1
    assert "error: nothing moves. This is rank 0 at step 0" in done.stderr
