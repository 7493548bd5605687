"""A tracker that is down, slow, without a key or not installed neither stops nor slows training, nor do several at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, call

import pytest
from support import ROOT

from data.terminal import drain
from launch.run import trackers
from launch.run.metrics import Monitor
from launch.run.trackers import TensorboardTracker, Tracked, Tracker, TrackioTracker, WandbTracker, start_trackers

WANDB = """
import os, sys, time
from pathlib import Path
from data.terminal import drain
from launch.run.metrics import Monitor
from launch.run.trackers import Tracked
monitor = Monitor(Path(sys.argv[1]), enabled=True, last_step=10)
run = Tracked(folder=Path(sys.argv[1]), project="p", run_id="abc", config={"api_key": "hunter2secret"}, wandb_mode="online")
monitor.start_trackers(["wandb"], run)
start = time.monotonic()
for step in range(3000):
    monitor.log({"step": step, "loss": 1.0, "load": [1.0, 2.0]})
print("logging took", time.monotonic() - start, flush=True)
monitor.close()
print("closing took", time.monotonic() - start, flush=True)
drain()
os._exit(0)
"""


def run_wandb(tmp_path: Path, **env: str) -> tuple[float, float, str]:
    pytest.importorskip("wandb", reason="W&B is not installed")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100,
        env={**clean, "HOME": str(tmp_path), **env},
    )  # fmt: skip
    logging, closing = (float(line.split()[-1]) for line in done.stdout.splitlines() if "took" in line)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3000
    assert "hunter2secret" not in done.stdout + done.stderr
    return logging, closing, done.stderr


def test_wandb_without_a_key(tmp_path: Path) -> None:
    logging, closing, said = run_wandb(tmp_path)
    assert logging < 20 and closing < 60
    assert said.count("warning: W&B:") == 1 and "metrics.jsonl has everything" in said


def test_wandb_that_never_answers(tmp_path: Path) -> None:
    """The real client against a server that takes the connection and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        logging, closing, _ = run_wandb(tmp_path, WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
        server.settimeout(0.1)
        server.accept()  # it did try
    assert logging < 20 and closing < 60


def test_wandb_that_is_down(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    logging, closing, _ = run_wandb(tmp_path, WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="0" * 40)
    assert logging < 20 and closing < 60


def test_wandb_offline_leaves_a_run_to_upload(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    program = WANDB.replace('wandb_mode="online"', 'wandb_mode="offline"').replace("3000", "5")
    command = [sys.executable, "-c", program, str(tmp_path), "--api_key", "hunter2secret"]  # W&B notes command lines too
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    found = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(found) == 1 and found[0].stat().st_size > 200
    assert b"hunter2secret" not in found[0].read_bytes()


@pytest.mark.parametrize(
    "home, known", [(None, True), ("/proc", True), (None, False)], ids=["no HOME", "read-only HOME", "a uid in no passwd file"]
)
def test_wandb_says_nothing_without_a_home(home: str | None, known: bool, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    program = WANDB.replace('wandb_mode="online"', 'wandb_mode="offline"').replace("3000", "5")
    if not known:
        program = "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid\n" + program
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    env |= {"TMPDIR": "/nonexistent", **({"HOME": home} if home else {})}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=100, env=env)
    assert "INFO" not in done.stderr and "warning" not in done.stderr, done.stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


class Loud(Tracker):
    """Fails where it is told to."""

    title = "loud"
    place = "open"

    def act(self, name: str) -> None:
        if self.place == name:
            raise RuntimeError(f"no {name}")

    def open(self) -> None:
        self.act("open")

    def log(self, step: int, curves: dict[str, float]) -> None:
        self.act("log")

    def log_load(self, step: int, load_YE: list[list[float]]) -> None:
        self.act("log_load")

    def finish(self) -> None:
        self.act("finish")


class Quiet(Loud):
    title, place = "quiet", ""

    def __init__(self, run: Tracked, *, detailed: bool = False) -> None:
        self.got: list[tuple[int, dict[str, float]]] = []
        super().__init__(run, detailed=detailed)

    def log(self, step: int, curves: dict[str, float]) -> None:
        self.got.append((step, curves))


@pytest.mark.parametrize("place", ["open", "log", "log_load", "finish"])
def test_one_that_fails_leaves_the_others_and_the_run_alone(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Loud, "place", place)
    monkeypatch.setitem(trackers.TRACKERS, "loud", Loud)
    monkeypatch.setitem(trackers.TRACKERS, "quiet", Quiet)
    monitor = Monitor(tmp_path, enabled=True, last_step=3)
    monitor.start_trackers(["loud", "quiet", "none"], Tracked(folder=tmp_path, project="p", run_id="r", config={}))
    for step in range(1, 801):  # fewer than the queue holds, for what it cannot take in time is dropped
        monitor.log({"step": step, "loss": 2.0, "expert_load": [[1, 2]]})
    assert monitor.close()
    drain()
    assert capfd.readouterr().err.count(f"warning: loud: no {place}; metrics.jsonl has everything") == 1
    (quiet,) = [tracker for tracker in monitor._trackers if isinstance(tracker, Quiet)]
    assert [step for step, _ in quiet.got] == list(range(1, 801)) and quiet.got[0][1] == {"train/loss": 2.0, "train/skipped": 0.0}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 800


def test_a_package_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    monitor = Monitor(tmp_path, enabled=True, last_step=3)
    monitor.start_trackers(["trackio"], Tracked(folder=tmp_path, project="p", run_id="r", config={}))
    monitor.log({"step": 1, "loss": 2.0})
    assert monitor.close()
    drain()
    assert "warning: trackio: import of trackio halted" in capfd.readouterr().err


def test_none_and_a_disabled_wandb_are_no_trackers(tmp_path: Path) -> None:
    run = Tracked(folder=tmp_path, project="p", run_id="r", config={}, wandb_mode="disabled")
    assert start_trackers(["none"], run) == [] and start_trackers(["wandb"], run) == []


ROWS: list[dict[str, Any]] = [
    {"step": 10, "loss": 2.5, "max_vio": [0.1, 0.4], "mfu": None},
    {"step": 10, "val_loss": 2.75},
    {"step": 20, "loss": 2.25, "max_vio": [0.2, 0.3], "expert_load": [[3, 5], [8, 0]]},
    {"step": 15, "loss": 2.0},  # after a rollback
]


def test_wandb_is_told_groups_steps_that_go_back_and_its_old_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, run, asked = ModuleType("wandb"), MagicMock(), {}
    fake.init = lambda **settings: asked.update(settings) or run  # type: ignore[attr-defined]
    fake.Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracked = Tracked(folder=tmp_path / "first", project="p", run_id="abc123", config={"api_key": "hunter2secret"})
    tracker = WandbTracker(tracked)
    for row in ROWS:
        tracker.write(row)
    assert tracker.close()
    assert (asked["id"], asked["resume"], asked["mode"]) == ("abc123", "allow", "offline")
    assert asked["config"] == {"api_key": "[redacted]"}
    logged = [call.args[0] for call in run.log.call_args_list]
    assert logged[0] == {
        "step": 10, "train/loss": 2.5, "train/skipped": 0.0, "router/max_vio/min": 0.1, "router/max_vio/mean": 0.25,
        "router/max_vio/median": 0.25,        "router/max_vio/p90": pytest.approx(0.37), "router/max_vio/max": 0.4,
    }  # fmt: skip
    assert logged[1] == {"step": 10, "validation/val_loss": 2.75}
    assert logged[3]["router/expert_load"] == (["layer", "expert", "tokens"], [[0, 0, 3], [0, 1, 5], [1, 0, 8], [1, 1, 0]])
    assert [row["step"] for row in logged] == [10, 10, 20, 20, 15] and run.finish.called
    assert call("*", step_metric="step") in run.define_metric.call_args_list


def test_trackio_is_called_as_wandb_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = MagicMock()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tracker = TrackioTracker(Tracked(folder=tmp_path / "first", project="p", run_id="abc", config={"lr": 1}))
    for row in ROWS:
        tracker.write(row)
    assert tracker.close()
    fake.init.assert_called_once_with(project="p", name="first-abc", config={"lr": 1}, resume="allow")
    assert [c.kwargs["step"] for c in fake.log.call_args_list] == [10, 10, 20, 15] and fake.finish.called


def test_tensorboard_reads_its_files_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, rows in ((0, ROWS[:3]), (15, [{"step": 20, "loss": 1.5}])):  # resumed at 15: step 20 is done again
        tracker = TensorboardTracker(Tracked(folder=tmp_path, project="p", run_id="r", config={}, first_step=first))
        for row in rows:
            tracker.write(row)
        assert tracker.close()
        time.sleep(1.1)  # its files are ordered by whole seconds
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5), (20, 1.5)]
    assert "router/max_vio/p90" in events.Tags()["scalars"]
