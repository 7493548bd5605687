"""Trackers: Weights & Biases, TensorBoard, trackio, several at once. Each runs behind a thread and a bounded queue, so that none
can stop or slow a run: what it cannot take in time is dropped, its errors are said once, and `metrics.jsonl` has every row.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from data.redact import redact
from data.terminal import say
from launch.run.tracker_names import grouped

CLOSE_SECONDS = 15.0  # that a tracker gets at the end of a run; W&B offline takes one or two
Row = dict[str, Any]
Curves = dict[str, float]
Table = list[list[float]]  # layers by experts


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """The run as its trackers know it. `run_id` comes from its own checkpoint: a run that goes on goes on in its tracker, too."""

    folder: Path
    project: str
    run_id: str
    config: dict[str, Any]
    first_step: int = 0
    wandb_mode: Any = "offline"  # online, offline or disabled, as W&B has it


class Tracker:
    """`write` and `close` are for the trainer; the other four run in the thread and may raise what they like."""

    title = "tracker"

    def __init__(self, run: Tracked, *, detailed: bool = False) -> None:
        self.run, self.detailed = run, detailed
        self._rows: queue.Queue[Row | None] = queue.Queue(maxsize=1000)
        self._thread = threading.Thread(target=self._serve, name=self.title, daemon=True)
        self._thread.start()

    def open(self) -> None:
        raise NotImplementedError

    def log(self, step: int, curves: Curves) -> None:
        raise NotImplementedError

    def log_load(self, step: int, load_YE: Table) -> None:
        """Every expert's tokens in a step; not every tracker has a place for a table."""

    def finish(self) -> None:
        raise NotImplementedError

    def _serve(self) -> None:
        try:
            self.open()
            while (row := self._rows.get()) is not None:
                curves = grouped(row, detailed=self.detailed)
                if curves:
                    self.log(row["step"], curves)
                if row.get("expert_load"):
                    self.log_load(row["step"], row["expert_load"])
            self.finish()
        except Exception as error:  # the one place where anything may go wrong without consequence
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            say(f"warning: {self.title}: {reason}; metrics.jsonl has everything")

    def write(self, row: Row) -> None:
        with contextlib.suppress(queue.Full):  # metrics.jsonl has the row
            self._rows.put_nowait(row)

    def close(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Let it finish, for a limited time; False where it did not."""
        while True:
            try:
                self._rows.put_nowait(None)
                break
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._rows.get_nowait()
        self._thread.join(seconds)
        return not self._thread.is_alive()


class WandbTracker(Tracker):
    """Online, or offline into the run's folder, for `wandb sync`. `step` is a metric of its own and every curve's axis: W&B drops
    rows whose own step goes back, as after a rollback."""

    title = "W&B"

    def open(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        run = self.run
        self._table = wandb.Table
        with cache_folder(run.folder / "wandb"), redacted_arguments():
            self._run = wandb.init(
                project=run.project, mode=run.wandb_mode, id=run.run_id, resume="allow", dir=str(run.folder),
                config=redact(run.config), name=run.folder.name,
            )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, curves: Curves) -> None:
        self._run.log({"step": step, **curves})

    def log_load(self, step: int, load_YE: Table) -> None:
        cells = [[layer, expert, tokens] for layer, load_E in enumerate(load_YE) for expert, tokens in enumerate(load_E)]
        self._run.log({"step": step, "router/expert_load": self._table(columns=["layer", "expert", "tokens"], data=cells)})

    def finish(self) -> None:
        self._run.finish()


def redacted_arguments() -> contextlib.AbstractContextManager[Any]:
    """W&B notes the command line as it is in its record of the machine, beside the configuration that it was given."""
    return patch.object(sys, "argv", redact(sys.argv))


@contextlib.contextmanager
def cache_folder(instead: Path) -> Iterator[None]:
    """Give W&B's process a folder for its own log: without a home to write in it would print the log to the terminal. And a home
    where neither HOME nor the passwd file has one, in a container under another uid: it looks for its settings there."""
    home = os.environ.get("XDG_CACHE_HOME") or (os.environ["HOME"] + "/.cache" if os.environ.get("HOME") else "")
    try:
        if home:
            os.makedirs(home, exist_ok=True)
        usable = bool(home) and os.access(home, os.W_OK)
    except OSError:
        usable = False
    names = [] if usable else ["XDG_CACHE_HOME"]
    if os.path.expanduser("~") == "~":
        names.append("HOME")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(instead.absolute())))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class TensorboardTracker(Tracker):
    """Event files in the run's folder under `tensorboard/`; what a resumed run does again takes the place of what was."""

    title = "TensorBoard"

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = self.run.first_step
        self._writer: Any = SummaryWriter(str(self.run.folder / "tensorboard"), purge_step=first + 1 if first else None)

    def log(self, step: int, curves: Curves) -> None:
        for name, value in curves.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_load(self, step: int, load_YE: Table) -> None:
        """As a picture, an expert a column and a layer a row: black is nothing, white twice the fair share or more."""
        load = np.asarray(load_YE, np.float32)
        share = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9) / 2
        picture = np.kron(np.clip(share, 0.0, 1.0), np.ones((12, 12), np.float32))
        self._writer.add_image("router/expert_load", picture, step, dataformats="HW")

    def finish(self) -> None:
        self._writer.close()


class TrackioTracker(Tracker):
    """Hugging Face's local tracker, whose calls are W&B's: `trackio show` draws it."""

    title = "trackio"

    def open(self) -> None:
        import trackio

        run = self.run
        self._trackio: Any = trackio
        trackio.init(project=run.project, name=f"{run.folder.name}-{run.run_id}", config=redact(run.config), resume="allow")

    def log(self, step: int, curves: Curves) -> None:
        self._trackio.log(curves, step=step)

    def finish(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "tensorboard": TensorboardTracker, "trackio": TrackioTracker}


def start_trackers(names: Sequence[str], run: Tracked, *, detailed: bool = False) -> list[Tracker]:
    """`none` and a disabled W&B are no trackers."""
    wanted = [name for name in names if name != "none" and not (name == "wandb" and run.wandb_mode == "disabled")]
    return [TRACKERS[name](run, detailed=detailed) for name in wanted]
