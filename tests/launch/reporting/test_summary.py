"""Where a run stands: by its lock where that tells, else by the time since its last line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from made_up_runs import CONFIG, healthy_rows, write_run

from data.lock import FolderLock
from launch.reporting.read import Run, read_run
from launch.reporting.summary import QUIET_SECONDS, brief, figures_of, goes_on, state_of

HALF_WAY = {"arguments": {**CONFIG["arguments"], "max_steps": 2000}}


def unfinished(folder: Path, *, quiet: float = 0.0) -> Run:
    run = read_run(write_run(folder, healthy_rows(every=50), **HALF_WAY))
    os.utime(folder / "metrics.jsonl", (0, time.time() - quiet))
    return run


def time_left(run: Run) -> str:
    return next(figure.value for figure in figures_of(run) if figure.label == "Time left")


def test_a_run_that_was_stopped_is_not_running_from_then_on(tmp_path: Path) -> None:
    run, lock = unfinished(tmp_path / "run"), FolderLock(tmp_path / "run")
    lock.take()
    assert state_of(run) == ("note", "running") and goes_on(run) and time_left(run) == "23 minutes"
    lock.release()
    assert state_of(run)[1].startswith("not running") and not goes_on(run) and time_left(run) == "–"


def test_a_long_evaluation_is_running_as_long_as_the_lock_is_held(tmp_path: Path) -> None:
    run, lock = unfinished(tmp_path / "run", quiet=3 * QUIET_SECONDS), FolderLock(tmp_path / "run")
    lock.take()
    assert state_of(run) == ("note", "running, nothing new for 45 minutes") and goes_on(run)
    lock.release()
    assert state_of(run)[0] == "bad" and not goes_on(run)


@pytest.mark.parametrize(("quiet", "runs"), [(0.5, True), (1.5, False)])
def test_where_no_lock_tells_it_is_the_time(tmp_path: Path, quiet: float, runs: bool) -> None:
    run = unfinished(tmp_path / "run", quiet=quiet * QUIET_SECONDS)
    (run.folder / ".lock").write_text("process 4711 on another-host")
    assert goes_on(run) is runs and (state_of(run)[1] == "running") is runs and (time_left(run) == "–") is not runs


def test_large_figures_are_in_the_unit_that_they_round_to() -> None:
    assert [brief(value) for value in (999_600, 524_288, 2.1e9, 999_960, 9_999, 3.41)] == [
        "1 M",
        "524 K",
        "2.1 B",
        "1 M",
        "9,999",
        "3.41",
    ]
    assert brief(999_600, 4) == "999.6 K"


def test_the_loss_is_that_of_steps_that_were_taken(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 2.0} for step in range(1, 30)] + [{"step": 30, "loss": 105.0, "skipped": "a spike"}]
    figures = {figure.label: figure.value for figure in figures_of(read_run(write_run(tmp_path / "run", rows)))}
    assert figures["Loss"] == "2"
