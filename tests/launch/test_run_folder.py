"""A run's folder: one run at a time, and never two runs in one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from launch.run_folder import FolderLock, check_same_run, difference

HOLD = """
import sys, time
from pathlib import Path
from launch.run_folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_by_name(holder: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"run is in use by another run \(process {holder.pid} on \S+\); end it"):
        FolderLock(tmp_path / "run").take()


def test_the_lock_of_a_killed_run_is_taken_over(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert f"process {holder.pid}" in (tmp_path / "run" / ".lock").read_text()  # its name still stands there
    lock = FolderLock(tmp_path / "run")
    lock.take()
    with pytest.raises(ValueError, match="in use by another run"):
        FolderLock(tmp_path / "run").take()
    lock.release()
    FolderLock(tmp_path / "run").take()


def test_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    held = {"model": {"hidden_size": 64, "layers": 2}, "seed": 1, "sequence_length": 32}
    (tmp_path / "config.json").write_text(json.dumps(held))
    check_same_run(tmp_path, held)
    with pytest.raises(ValueError, match=r"holds another run: model.hidden_size: 64 -> 128; seed: 1 -> 2; name another --output"):
        check_same_run(tmp_path, {**held, "seed": 2, "model": {"hidden_size": 128, "layers": 2}})


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    check_same_run(tmp_path, {})
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' but no run; name a new or empty folder"):
        check_same_run(tmp_path, {})


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        check_same_run(tmp_path, {})


def test_difference_by_path() -> None:
    assert difference({"a": {"b": 1, "c": [1]}, "d": 0}, {"a": {"b": 1, "c": [2]}, "e": 0}) == [
        "a.c: [1] -> [2]", "d: 0 -> null", "e: null -> 0"
    ]  # fmt: skip
