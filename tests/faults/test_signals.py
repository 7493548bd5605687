"""Signals and the clock: one checkpoint at the next step boundary, exit code 0, and the resumed run is the uninterrupted one."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from runs import STEPS, Site, assert_same, last_saved, rows, strike, temporary_folders

#: (where, signal, ranks that get it, the checkpoint that is left), each going on from the one before.
CHAIN = [
    ("1/0/building the engine", signal.SIGTERM, [1], 1),
    ("0/1/loading data", signal.SIGUSR1, None, 2),
    ("0/2/backward", signal.SIGINT, [0], 3),
    ("1/3/optimizer step", signal.SIGTERM, None, 5),
    ("1/6/evaluation, batch 1", signal.SIGUSR1, [1], 7),
    ("0/8/saving: writing", signal.SIGTERM, None, 9),
]


def test_every_signal_in_every_phase(site: Site, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for where, number, ranks, saved in CHAIN:
        running = strike(site, run, where, number, ranks)
        assert [running.codes[r] for r in (0, 1)] == [0, 0], (where, running.text()[-3000:])
        assert last_saved(run) == f"step_{saved}", (where, running.text()[-3000:])
        assert f"stopped by {signal.Signals(number).name if ranks != [1] else 'another rank'} at step {saved}" in running.text()
        assert not temporary_folders(run)
    site.finish(run)
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("where", [where for where, *_ in CHAIN] + ["1/0/choosing a checkpoint", "1/0/preflight"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
@pytest.mark.parametrize("ranks", [[0], [1], None], ids=str)
def test_each_signal_at_each_place(site: Site, whole: Path, tmp_path: Path, where: str, number: int, ranks: list | None) -> None:
    running = strike(site, tmp_path / "run", where, number, ranks)
    assert running.wait() == [0, 0], running.text()[-3000:]
    assert last_saved(tmp_path / "run") == f"step_{rows(tmp_path / 'run')[-1]['step']}" != f"step_{STEPS}"
    site.finish(tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_a_second_signal_stops_at_once(site: Site, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = site.start(run, pause_at="0/8/saving: writing")
    running.until_paused(0)
    running.signal(signal.SIGINT, [1])
    time.sleep(0.3)  # two signals that are pending together are one
    running.signal(signal.SIGINT, [1])
    running.until(lambda: 1 in running.poll(), "end of rank 1")
    assert running.codes[1] == 128 + signal.SIGINT
    running.signal(signal.SIGCONT)
    running.wait()
    assert running.codes[0] == 1
    assert "second signal: stopping at once" in running.text()
    assert last_saved(run) == "step_6"  # the save that it broke off left the one before it


def test_the_clock(site: Site, tmp_path: Path) -> None:
    """0.002 hours are 7.2 seconds, of a run that would go on for much longer."""
    started = time.monotonic()
    running = site.finish(tmp_path / "run", max_steps=5000, max_hours=0.002, log_interval=100, eval_interval=0, save_interval=5000)
    assert time.monotonic() - started > 7.2
    saved = last_saved(tmp_path / "run")
    assert f"stopped by --max_hours at {saved.replace('_', ' ')}" in running.text()
