"""Hangs have a culprit: a rank that stalls, spins or raises; all ranks end in the stated time, the last lines name it."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from nursery import ROOT, Ranks
from runs import Site, assert_same, last_saved, lost_bytes, struck

STALL = 8.0
#: silence or stall, then two beats and what a loaded machine adds.
END_SECONDS = STALL + 30
FAULTY = str(ROOT / "tests" / "faults" / "faulty_train.py")


def last_lines(running: Ranks) -> list[str]:
    return [line for line in running.text().splitlines() if line.startswith("error")]


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named(site: Site, whole: Path, tmp_path: Path, stopped: int) -> None:
    run = tmp_path / "run"
    running = site.start(run, pause_at=f"{stopped}/5/backward", stall_timeout=STALL)
    running.until_paused(stopped, " at step 5, backward")
    paused = time.monotonic()
    other = 1 - stopped
    running.until(lambda: other in running.poll(), "end of the other rank", timeout=120)
    assert running.codes[other] == 17
    assert running.ended[other] - paused < END_SECONDS
    said = (
        r"rank 0 has (not answered for \d+ s \(stopped.*\)|been silent for \d+ s)"
        if stopped == 0
        else r"rank 1 has been silent for \d+ s"
    )
    heard = r"(; last at step \d, [^(]+ \(host \S+\))?"  # if it was heard of at all: a beat is two seconds
    assert re.search(rf"error: {said}{heard}\. This is rank {other} at step 5", last_lines(running)[-1])
    assert "Thread 0x" in running.text()  # the stacks of one who waited
    running.signal(signal.SIGKILL, [stopped])
    running.wait()
    struck("SIGSTOP of one rank", lost_bytes(run))
    if stopped:
        assert last_saved(run) == "step_4"
        site.finish(run)
        assert_same(run, whole)


@pytest.mark.parametrize(
    "fault, where, cause",
    [
        ("raise", "step 5, loading data", "ZeroDivisionError: planted"),
        pytest.param("disk", "step 5, loading data", "OSError: .*planted", marks=pytest.mark.slow),
        pytest.param("memory", "step 5, loading data", "OutOfMemoryError: planted", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_raises_is_named(site: Site, tmp_path: Path, fault: str, where: str, cause: str) -> None:
    running = site.start(tmp_path / "run", script=FAULTY, env={"FAULT": fault})
    assert running.wait() == [1, 1]
    assert max(running.ended.values()) - min(running.ended.values()) < 14
    lines = last_lines(running)
    assert lines and all(re.search(rf"error: rank 1 failed at {where} \(host \S+\): {cause}", line) for line in lines), lines
    struck(f"{cause.split(':')[0]} on one rank")


@pytest.mark.parametrize("flags", [(), pytest.param(("--no-async_save",), marks=pytest.mark.slow)], ids=str)
def test_a_fault_of_the_program_in_a_save_ends_the_run_with_its_traceback(site: Site, tmp_path: Path, flags: tuple) -> None:
    """Not as a full disk does, which is said and trained on from."""
    running = site.start(tmp_path / "run", script=FAULTY, env={"FAULT": "broken save"}, extra=flags)
    assert running.wait() == [1, 1], running.text()[-3000:]
    said = running.text()
    assert "Traceback" in said and "KeyError: 'weights'" in said and "faulty_train.py" in said
    lines = last_lines(running)
    assert lines and all(re.search(r"error: rank 1 failed at step \d+, .*: KeyError: 'weights'", line) for line in lines), lines
    assert "the next save that fails" not in said
    struck("KeyError on one rank in a save")


def test_a_rank_that_spins_is_named(site: Site, tmp_path: Path) -> None:
    """It beats, and gets nowhere: after the stall time the ranks that are behind come first, with their stacks."""
    running = site.start(tmp_path / "run", script=FAULTY, env={"FAULT": "spin"}, stall_timeout=STALL)
    codes = running.wait(timeout=90)
    assert 17 in codes and 0 not in codes, running.text()[-3000:]
    lines = last_lines(running)
    assert lines and all("no rank has moved for 8 s: rank 1 at step 5, loading data" in line for line in lines), lines
    assert "faulty_train.py" in running.text()
    struck("endless loop on one rank")


def test_a_job_that_is_suspended_as_a_whole_goes_on(site: Site, whole: Path, tmp_path: Path) -> None:
    """A laptop's sleep, `scontrol suspend`, a paused VM: longer than the silence that is a fault while awake."""
    run = tmp_path / "run"
    running = site.start(run, pause_at="1/5/backward", stall_timeout=STALL)
    running.until_paused(1, " at step 5, backward")
    running.signal(signal.SIGSTOP)
    time.sleep(STALL + 8)
    running.signal(signal.SIGCONT)
    assert running.wait() == [0, 0], running.text()[-3000:]
    assert_same(run, whole)
    struck("SIGSTOP of all ranks, longer than the timeout")


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_said(site: Site, tmp_path: Path) -> None:
    """Rank 0 dies before it has opened its port. Torch's own clients would try again and again."""
    running = site.start(tmp_path / "run", stall_timeout=STALL)
    running.signal(signal.SIGKILL, [0])
    started = time.monotonic()
    assert running.wait() == [-signal.SIGKILL, 17], running.text()[-2000:]
    assert time.monotonic() - started < STALL + 40  # torch alone waits 300 s
    assert "error: rank 1 has waited 8 s for all ranks to join (rank 0 is to be at 127.0.0.1:" in last_lines(running)[-1]
    struck("SIGKILL of rank 0 before the ranks have joined")
