"""A run's folder: one run at a time, and never two runs in one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import ROOT

from data.lock import take_folder
from launch.checkpoint.identity import RunIdentity
from launch.run.folder import FolderWatch, check_same_run

HOLD = """
import sys, time
from pathlib import Path
from data.lock import take_folder
lock = take_folder(Path(sys.argv[1]), "run")
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
        take_folder(tmp_path / "run", "run")


def test_the_lock_of_a_killed_run_is_taken_over(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert f"process {holder.pid}" in (tmp_path / "run" / ".lock").read_text()  # its name still stands there
    lock = take_folder(tmp_path / "run", "run")
    with pytest.raises(ValueError, match="in use by another run"):
        take_folder(tmp_path / "run", "run")
    lock.release()
    take_folder(tmp_path / "run", "run")


def test_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    held = RunIdentity(model={"hidden_size": 64, "num_hidden_layers": 2}, seed=1, sequence_length=32)
    (tmp_path / "config.json").write_text(json.dumps({**held.to_json(), "command": ["..."]}))
    check_same_run(tmp_path, held)
    with pytest.raises(ValueError, match=r"holds another run: model.hidden_size: 64 -> 128; seed: 1 -> 2; name another --output"):
        check_same_run(tmp_path, replace(held, seed=2, model={"hidden_size": 128, "num_hidden_layers": 2}))


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    check_same_run(tmp_path, RunIdentity(model={}))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' but no run; name a new or empty folder"):
        check_same_run(tmp_path, RunIdentity(model={}))


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        check_same_run(tmp_path, RunIdentity(model={}))


def test_a_folder_that_is_deleted_or_replaced_is_noticed_once(tmp_path: Path, synced: list[Path]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    watch = FolderWatch(folder)
    assert not watch.is_lost()
    folder.rename(tmp_path / "moved")
    assert watch.is_lost() and folder.is_dir() and synced == [tmp_path], "a save in it must survive a power cut"
    assert not watch.is_lost()
    (tmp_path / "moved").rename(folder)
    assert watch.is_lost(), "another folder of that name"
    assert not watch.is_lost()
