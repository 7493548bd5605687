"""Curves of a bounded number of points that still show every spike: each bucket of steps keeps mean, least and greatest value.

Shapes: N logged steps, P points, Y layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.reporting.catalogue import NOT_DRAWN
from launch.reporting.checks import is_finite
from launch.reporting.columns import Columns, Floats
from launch.reporting.read import Run

POINTS = 1000  # of one curve of one run: about what a screen can show side by side
LEAST_POINTS = 120
Numbers = list[float | None]


def points_each(runs: int) -> int:
    """Fewer for each of many runs, so that the page keeps its size."""
    return max(LEAST_POINTS, POINTS // max(1, runs))


def bucket_starts(rows: int, points: int) -> NDArray[np.int64]:
    """First row of each of at most `points` buckets of nearly equal size."""
    return np.unique(np.linspace(0, rows, min(rows, points), endpoint=False).astype(np.int64))


def shorten(values: NDArray[Any], digits: int = 5) -> Numbers:
    """For JSON: what is not finite is null, and five digits are enough for a curve."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values.tolist()]


def summarize(column: Floats, starts: NDArray[np.int64], skipped: NDArray[np.bool_] | None = None) -> dict[str, Numbers]:
    """Mean, least and greatest of each bucket, over what is finite there; only `y` where no bucket has two rows. A skipped step
    counts for the mean only of a bucket that has no other."""
    finite = np.isfinite(column)
    mean = _mean(column, finite, starts)
    if skipped is not None and skipped.any():
        of_taken = _mean(column, finite & ~skipped, starts)
        mean = np.where(np.isnan(of_taken), mean, of_taken)
    if len(starts) == len(column):
        return {"y": shorten(mean)}
    least = np.minimum.reduceat(np.where(finite, column, np.inf), starts)
    greatest = np.maximum.reduceat(np.where(finite, column, -np.inf), starts)
    return {"y": shorten(mean), "lo": shorten(least), "hi": shorten(greatest)}


def _mean(column: Floats, counted: NDArray[np.bool_], starts: NDArray[np.int64]) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Floats = np.add.reduceat(np.where(counted, column, 0.0), starts) / np.add.reduceat(counted, starts, dtype=np.int64)
    return mean


def summarize_layers(column_NY: Floats, starts: NDArray[np.int64]) -> dict[str, Numbers]:
    """The median layer as the curve, between the least and the greatest of any layer (and step of the bucket)."""
    empty_N = ~np.isfinite(column_NY).any(axis=1)
    filled_NY = np.where(np.isfinite(column_NY), column_NY, np.nan)
    filled_NY[empty_N] = 0.0  # so that numpy does not warn of rows without a number
    median_N = np.median(filled_NY, axis=1) if not np.isnan(filled_NY).any() else np.nanmedian(filled_NY, axis=1)
    least_N, greatest_N = np.nanmin(filled_NY, axis=1), np.nanmax(filled_NY, axis=1)
    for numbers_N in (median_N, least_N, greatest_N):
        numbers_N[empty_N] = np.nan
    return {
        "y": summarize(median_N, starts)["y"],
        "lo": _extreme(least_N, starts, np.minimum, np.inf),
        "hi": _extreme(greatest_N, starts, np.maximum, -np.inf),
    }


def _extreme(column: Floats, starts: NDArray[np.int64], function: np.ufunc, missing: float) -> Numbers:
    return shorten(function.reduceat(np.where(np.isfinite(column), column, missing), starts))


def training_hours(train: Columns) -> Floats:
    """Hours of training at each row: tokens over the measured throughput, so neither evaluation nor a pause counts."""
    tokens, speed = train.get("tokens"), train.get("tokens_per_second")
    known = np.isfinite(speed) & (speed > 0)
    if not known.any():
        return np.full(len(train), np.nan)
    speed = np.where(known, speed, np.median(speed[known]))
    new = np.diff(np.where(np.isfinite(tokens), tokens, 0.0), prepend=0.0)
    hours: Floats = np.cumsum(np.maximum(new, 0.0) / speed) / 3600
    return hours


def per_layer_columns(train: Columns) -> dict[str, Floats]:
    """With max_vio under the field's name, also from runs that only logged the ratio."""
    layers = dict(train.layers)
    if "load_max_over_mean" in layers:
        layers.setdefault("max_vio", layers["load_max_over_mean"] - 1)
    return layers


def curves_of(run: Run, points: int) -> dict[str, Any]:
    """For the page: `axis` (step, tokens, hours of each point), `curves` by metric, `points` of the evaluations, and `skipped`: the
    points without a step that was taken."""
    train = run.train
    result: dict[str, Any] = {"axis": {"step": [], "tokens": [], "hours": []}, "curves": {}, "points": _evaluations(run)}
    result["skipped"] = []
    if not len(train):
        return result
    starts = bucket_starts(len(train), points)
    ends = np.append(starts[1:], len(train)) - 1
    result["axis"] = {
        "step": train.steps[ends].tolist(),
        "tokens": shorten(train.get("tokens")[ends], 7),
        "hours": shorten(training_hours(train)[ends]),
    }
    taken = np.add.reduceat(~train.skipped, starts, dtype=np.int64)
    result["skipped"] = np.flatnonzero(taken == 0).tolist()
    for name, column in train.scalars.items():
        if name not in NOT_DRAWN and np.isfinite(column).any():
            result["curves"][name] = summarize(column, starts, train.skipped)
    for name, column in per_layer_columns(train).items():
        if name not in NOT_DRAWN and np.isfinite(column).any():
            result["curves"][name] = summarize_layers(column, starts)
    return result


def _evaluations(run: Run) -> dict[str, dict[str, list[Any]]]:
    """What is not measured at every logged step, by name: of evaluations, snapshots and saves, down to POINTS of each."""
    found: dict[str, list[tuple[int, float]]] = {}
    for rows in (run.evaluations, run.snapshots, run.saves):
        for row in rows[:: math.ceil(len(rows) / POINTS) or 1]:
            for name, value in _numbers(row):
                found.setdefault(name, []).append((int(row["step"]), value))
    return {
        name: {"step": [step for step, _ in pairs], "y": shorten(np.array([y for _, y in pairs], np.float64))}
        for name, pairs in found.items()
    }


def _group(name: str) -> str:
    """DeepSpeed names the experts' group by the ranks they lie on, `ep_size_8`: runs on other numbers of ranks are compared too."""
    return "experts" if name.startswith("ep_size") else name


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """val_*, eval/*, save_seconds, the median layer of a list, and the parts of `update_to_weight`; what is finite."""
    candidates = [(name, value) for name, value in row.items() if name.startswith(("val_", "eval/")) or name == "save_seconds"]
    masses = row.get("attention_sink_mass")
    if isinstance(masses, list) and masses and all(is_finite(mass) for mass in masses):
        candidates.append(("attention_sink_mass", float(np.median(masses))))
    ratios = row.get("update_to_weight")
    if isinstance(ratios, dict):
        candidates += [(f"update_to_weight: {_group(name)}", ratio) for name, ratio in ratios.items()]
    return ((name, float(value)) for name, value in candidates if is_finite(value))
