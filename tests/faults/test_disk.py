"""Disks that fill up, are full from the start, or cannot be written: one sentence, and what was saved stays whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nursery import ROOT
from runs import Site, assert_same, last_saved, lost_bytes, rows, struck
from support import metrics

FAULTY = str(ROOT / "tests" / "faults" / "faulty_train.py")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - leave)
    return filler


def test_a_save_that_fails_on_one_rank_is_said_and_the_next_succeeds(site: Site, whole: Path, tmp_path: Path) -> None:
    """Rank 1 can write no more from step 7 on until step 10: the save of step 8 fails, those of 12 and of the end succeed."""
    run = tmp_path / "run"
    said = site.finish(run, script=FAULTY, env={"FAULT": "full", "FAULT_SAMPLES": "56,64,72"}).text()
    (failed,) = [row for row in metrics(run) if "save_failed" in row]
    assert failed["save_failed"].startswith("rank 1: writing step_8 failed") and "File too large" in failed["save_failed"]
    assert "the next save that fails ends the run" in said
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_12", "step_4", "step_6"]
    assert_same(run, whole)
    struck("full disk on one rank in a save", lost_bytes(run))


def test_two_saves_in_a_row_that_fail_end_the_run_which_then_goes_on(site: Site, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = site.start(run, script=FAULTY, env={"FAULT": "full", "FAULT_SAMPLES": "56,64,72,80,88"})
    assert running.wait() == [2, 2]
    assert "error: rank 1: writing step_12 failed" in running.text() and "Traceback" not in running.text()
    assert last_saved(run) == "step_6" and lost_bytes(run) == 0
    site.finish(run)
    assert_same(run, whole)
    struck("full disk on one rank until the end", lost_bytes(run))


def test_a_disk_too_small_for_a_checkpoint_is_refused_before_the_first_step(site: Site, small_disk: Path) -> None:
    fill(small_disk, leave=1_000_000)
    running = site.start(small_disk / "run")
    assert running.wait() == [2, 2]
    assert "error: a checkpoint takes about" in running.text() and "make room" in running.text()
    assert not [row for row in rows(small_disk / "run") if "loss" in row]
    struck("disk too small for a checkpoint")


def test_a_disk_that_is_full_from_the_start(site: Site, small_disk: Path) -> None:
    fill(small_disk, leave=0)
    running = site.start(small_disk / "run")
    assert running.wait() == [2, 2], running.text()
    errors = [line for line in running.text().splitlines() if "rror" in line]
    assert len(errors) == 1 and "No space left on device" in errors[0], running.text()
    struck("full disk from the start")


def test_a_disk_that_fills_up_under_checkpoints_and_logs(site: Site, whole: Path, small_disk: Path) -> None:
    """Something else fills the disk while a rank pauses before a save; with room again, the same command goes on to the bit."""
    run = small_disk / "run"
    running = site.start(run, pause_at="0/7/loading data", keep_last=1)
    running.until_paused(0)
    filler = fill(small_disk, leave=0)
    running.signal(signal.SIGCONT)
    assert running.wait() == [2, 2], running.text()
    assert "needs" in running.text() and "make room" in running.text()
    assert last_saved(run) in ("step_4", "step_6") and lost_bytes(run) == 0  # step_6 was being written in the background
    metrics(run)  # whole lines
    filler.unlink()
    site.finish(run, keep_last=1)
    losses = {row["step"]: row["loss"] for row in rows(run) if "loss" in row}
    assert losses == {row["step"]: row["loss"] for row in rows(whole) if "loss" in row}
    struck("full disk under checkpoints and logs", lost_bytes(run))


def test_a_folder_that_cannot_be_written(site: Site, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    running = site.start(small_disk / "run")
    assert running.wait() == [2, 2]
    errors = [line for line in running.text().splitlines() if "rror" in line]
    assert len(errors) == 1 and "Read-only file system" in errors[0], running.text()
    struck("read-only folder")
