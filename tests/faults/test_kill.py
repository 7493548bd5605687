"""Ranks that die: the others name them and end, nothing is lost, and the next start goes on to the bit."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest
from runs import STEPS, Site, assert_same, last_saved, lost_bytes, strike, struck

#: (where, rank that is killed or None for all, the checkpoint that `latest` names afterwards)
CHAIN = [
    ("1/2/backward", 1, None),
    ("0/4/saving: publishing", None, None),
    ("0/5/optimizer step", 0, "step_4"),
    ("1/0/loading a checkpoint", 1, "step_4"),
    ("1/7/loading data", None, "step_6"),
    ("0/8/saving: writing", 1, "step_6"),
    ("1/11/forward", 1, "step_8"),
]
#: Seconds in which the surviving ranks end; twice what the watchdog promises, for a machine that others use as well.
END_SECONDS = 14


def test_killed_anywhere(site: Site, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for where, victim, saved in CHAIN:
        settle = {"PAUSE_SETTLE": "0" if "saving" in where else "1"}
        running = strike(site, run, where, signal.SIGKILL, None if victim is None else [victim], env=settle)
        killed = [0, 1] if victim is None else [victim]
        assert all(running.codes[r] == -signal.SIGKILL for r in killed), running.codes
        assert lost_bytes(run) == 0
        assert (last_saved(run) if (run / "checkpoints" / "latest").exists() else None) == saved, where
        if victim is not None:
            assert_named(running, victim, where)
    site.finish(run)
    assert_same(run, whole)


def assert_named(running, victim: int, where: str) -> None:
    """The survivor has ended in time, and its last line says who was the cause and where it was."""
    survivor = 1 - victim
    assert running.codes[survivor] == 1
    assert running.ended[survivor] - running.ended[victim] < END_SECONDS
    last = running.text().strip().splitlines()[-1]
    if victim == 0:  # it kept what the ranks knew of each other
        assert "rank 0 is gone without a word" in last, last
    else:
        assert re.search(r"error: died without a word .*: rank 1 at step \d+, \w+", last), last
    assert f"This is rank {survivor} at step" in last


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_moments(site: Site, whole: Path, tmp_path: Path, seed: int) -> None:
    """All ranks or one, at any moment of the start or the training, until a run gets through."""
    draw, run = random.Random(seed), tmp_path / "run"
    strikes = 0
    for _ in range(12):
        running = site.start(run)
        # Three in ten during the start; and never so late that the first kill of a test would miss.
        after = site.seconds * (draw.uniform(0, 0.3) if draw.random() < 0.3 else draw.uniform(0.1, 1.0 if strikes else 0.8))
        end = time.monotonic() + after
        while time.monotonic() < end and len(running.poll()) < 2:
            time.sleep(0.02)
        in_time = not running.poll()
        victims = draw.choice([None, [0], [1]])
        running.signal(signal.SIGKILL, victims)
        running.wait()
        if in_time:
            strikes += 1
            struck(f"SIGKILL to {'all ranks' if victims is None else 'one rank'} at a random moment", lost_bytes(run))
        assert lost_bytes(run) == 0
        if (run / "checkpoints" / "latest").exists() and last_saved(run) == f"step_{STEPS}":
            break
    assert strikes
    site.finish(run)
    assert_same(run, whole)
