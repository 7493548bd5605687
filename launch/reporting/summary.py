"""Where a run stands, in a few figures."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.lock import is_held
from launch.nested import lookup
from launch.reporting.checks import is_finite
from launch.reporting.columns import Floats, to_number
from launch.reporting.curves import per_layer_columns, training_hours
from launch.reporting.read import Run
from launch.words import BILLIONS, duration, short

RECENT = 20
QUIET_SECONDS = 15 * 60  # without a new line a run is no longer said to run, where its lock cannot tell


@dataclass(frozen=True, kw_only=True)
class Figure:
    label: str
    value: str
    sub: str = ""


def brief(value: float, digits: int = 3) -> str:
    """`2.1 B`, `524 K`, `3.41`, and a dash where there is nothing."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e4:
        return short(value, digits, BILLIONS)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits + 1}g}"


def planned_steps(run: Run) -> int:
    """0 where the run has no configuration."""
    steps, stop = lookup(run.config, "arguments.max_steps"), lookup(run.config, "arguments.stop_after")
    steps = steps if isinstance(steps, int) else 0
    return min(steps, stop) if isinstance(stop, int) and stop else steps


def _is_through(run: Run) -> bool:
    return 0 < planned_steps(run) <= run.last_step


def _quiet_seconds(run: Run) -> float:
    """Since its last line."""
    return time.time() - (run.folder / "metrics.jsonl").stat().st_mtime


def state_of(run: Run) -> tuple[str, str]:
    """(a word for its color, the state in words)"""
    if _is_through(run):
        return "good", "finished"
    quiet = _quiet_seconds(run)
    if not is_running(run.folder, quiet):
        return "bad", f"not running: nothing new for {duration(quiet)}"
    return "note", "running" + (f", nothing new for {duration(quiet)}" if quiet > QUIET_SECONDS else "")


def is_running(folder: Path, quiet: float) -> bool:
    """By the lock that training holds; where that cannot be told, by the seconds without a sign of life."""
    held = is_held(folder)
    return quiet <= QUIET_SECONDS if held is None else held


def goes_on(run: Run) -> bool:
    """Whether more is to come. After the last step there is an evaluation, then a checkpoint: its row is a run's last."""
    saved = any(mark.kind in {"checkpoint", "save_failed"} and mark.step >= run.last_step for mark in run.marks)
    return is_running(run.folder, _quiet_seconds(run)) and not (_is_through(run) and saved)


def recent(column: Floats) -> float:
    """Mean of the last RECENT finite values: one step says little."""
    finite = column[np.isfinite(column)][-RECENT:]
    return float(finite.mean()) if len(finite) else math.nan


def best_evaluation(run: Run) -> tuple[int, float, float]:
    """(step, loss, bits per byte); NaN where there is none."""
    rows = [(row["val_loss"], row) for row in run.evaluations if is_finite(row["val_loss"])]
    if not rows:
        return 0, math.nan, math.nan
    loss, row = min(rows, key=lambda pair: pair[0])
    bits = row.get("val_bits_per_byte")
    return int(row["step"]), loss, to_number(bits)


def figures_of(run: Run) -> list[Figure]:
    """For the tiles of one run, and for the columns of a table of runs."""
    train, planned = run.train, planned_steps(run)
    taken = train.where(~train.skipped)
    hours = training_hours(train)
    speed, mfu = recent(train.get("tokens_per_second")), recent(train.get("mfu"))
    tokens = float(train.get("tokens")[-1]) if len(train) else math.nan
    at, best, bits = best_evaluation(run)
    return [
        Figure(label="Step", value=f"{run.last_step:,}", sub=f"of {planned:,}" if planned else ""),
        Figure(label="Loss", value=brief(recent(taken.get("loss")), 4), sub=f"last {RECENT} lines"),
        Figure(
            label="Best validation", value=brief(best, 4), sub=f"at step {at:,}" if math.isfinite(best) else "no evaluation yet"
        ),
        Figure(label="Bits per byte", value=brief(bits, 4), sub="at the same step"),
        Figure(label="Tokens", value=brief(tokens), sub=f"{duration(3600 * float(hours[-1]))} of steps" if len(hours) else ""),
        Figure(label="Tokens/s", value=brief(speed), sub=f"MFU {mfu:.1%}" if math.isfinite(mfu) else ""),
        _imbalance(run),
        _time_left(run, planned, tokens, speed),
    ]


def _imbalance(run: Run) -> Figure:
    """The worst layer's max_vio lately."""
    column_NY = per_layer_columns(run.train).get("max_vio")
    if column_NY is None:
        return Figure(label="Worst max_vio", value="–", sub="no routers logged")
    late_Y = np.array([recent(column_NY[:, layer]) for layer in range(column_NY.shape[1])])
    layer = int(np.nanargmax(late_Y)) if np.isfinite(late_Y).any() else 0
    return Figure(label="Worst max_vio", value=brief(float(late_Y[layer]), 2), sub=f"in layer {layer}")


def _time_left(run: Run, planned: int, tokens: float, speed: float) -> Figure:
    """Of a run that goes on."""
    value, sub = "–", "at this speed"
    if _is_through(run):
        value = "none"
    elif not is_running(run.folder, _quiet_seconds(run)):
        sub = "it does not run"
    elif planned and run.last_step and math.isfinite(tokens / (speed or math.nan)):
        value = duration(tokens / run.last_step * (planned - run.last_step) / speed)
    return Figure(label="Time left", value=value, sub=sub)
