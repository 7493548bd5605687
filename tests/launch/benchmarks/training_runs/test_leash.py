"""`launch.benchmarks.training_runs.leash`: what a benchmark started ends with it, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, process_stat

from launch.benchmarks.training_runs.leash import run_leashed

#: A launcher with a rank that is slow to save: it writes both pids, dies of Ctrl-C at once, and the rank says how it ended.
COMMAND = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if os.fork():
    (folder / "launcher").write_text(str(os.getpid()))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
else:
    def save(*_):
        time.sleep(float(sys.argv[2]))
        (folder / "saved").touch()
        os._exit(0)
    signal.signal(signal.SIGINT, save)
    (folder / "rank.tmp").write_text(str(os.getpid()))
    (folder / "rank.tmp").rename(folder / "rank")
time.sleep(600)
"""
BENCHMARK = """
import signal, sys
from pathlib import Path
from launch.benchmarks.training_runs.leash import run_leashed
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are a shell's background job
run_leashed([sys.executable, "-c", *sys.argv[2:]], Path(sys.argv[1]) / "log")
"""


def start(folder: Path, saving: float) -> subprocess.Popen[bytes]:
    """Until launcher and rank run."""
    process = subprocess.Popen([sys.executable, "-c", BENCHMARK, str(folder), COMMAND, str(folder), str(saving)], cwd=ROOT)
    while not (folder / "rank").exists() or not (folder / "launcher").exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


def alive(pid: int) -> bool:
    """A zombie, which waits for its reaper, is not."""
    try:
        return process_stat(pid)[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_the_end(folder: Path) -> None:
    pids = [int((folder / name).read_text()) for name in ("launcher", "rank")]
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "it outlived its parent"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])  # 1: `python -c` and KeyboardInterrupt
def test_a_signal_lets_the_ranks_save(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = start(tmp_path, 0.5)
    process.send_signal(number)
    assert process.wait() in (code, -number)
    assert (tmp_path / "saved").exists() and not any(alive(int((tmp_path / n).read_text())) for n in ("launcher", "rank"))


@pytest.mark.parametrize("signals", [(signal.SIGKILL,), (signal.SIGTERM, signal.SIGTERM)], ids=["SIGKILL", "SIGTERM twice"])
def test_nothing_outlives_it(tmp_path: Path, signals: tuple[signal.Signals, ...]) -> None:
    process = start(tmp_path, 600)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)  # two signals at once are one
    process.wait()
    wait_for_the_end(tmp_path)
    assert not (tmp_path / "saved").exists()


def test_exit_codes_and_words(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_leashed([sys.executable, "-c", "print('done')"], tmp_path / "log") == 0
    assert run_leashed([sys.executable, "-c", "import sys; sys.exit('no')"], tmp_path / "log") == 1
    assert run_leashed([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "log") == 137
    assert (tmp_path / "log").read_text().split() == ["done", "no"]
    assert signal.getsignal(signal.SIGTERM) == before
