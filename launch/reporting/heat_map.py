"""Heat maps, packed: one byte a cell between a least and a greatest value, as base64.

Shapes: N logged steps, P columns of a map, Y layers, E experts, G rows of a layer whose experts are merged.
"""

from __future__ import annotations

import base64
import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.reporting.columns import Floats
from launch.reporting.curves import bucket_starts, per_layer_columns
from launch.reporting.read import Run

COLUMNS = 320
LEAST_COLUMNS = 8  # a map that would get fewer is left out, or has its experts merged
CELLS = 60_000  # of one metric's maps of all runs: 80 KB in the page
MAPS = ("max_vio", "max_vio_window", "load_entropy", "unused_experts", "bias_range", "router_logit_rms", "attention_sink_mass")
EMPTY = 255


def pack(cells_RP: Floats, steps: NDArray[np.int64]) -> dict[str, Any]:
    """Rows by columns as `data` (bytes 0 to 254 between `lo` and `hi`, 255 for nothing), and the step of each column."""
    finite = np.isfinite(cells_RP)
    lo, hi = (float(cells_RP[finite].min()), float(cells_RP[finite].max())) if finite.any() else (0.0, 0.0)
    scaled = (np.where(finite, cells_RP, lo) - lo) / ((hi - lo) or 1.0)
    cells = np.where(finite, np.rint(scaled * (EMPTY - 1)), EMPTY).astype(np.uint8)
    data = base64.b64encode(cells.tobytes()).decode("ascii")
    return {"rows": len(cells_RP), "columns": len(steps), "lo": lo, "hi": hi, "steps": steps.tolist(), "data": data}


def columns_for(rows: int, cells: int) -> int:
    """As many as a map of this many rows may have."""
    return min(COLUMNS, cells // max(1, rows))


def layer_map(column_NY: Floats, steps: NDArray[np.int64], cells: int) -> dict[str, Any] | None:
    """A cell is the mean over its steps: what lasts shows, and a single step's peak is in the curves' band."""
    columns = columns_for(column_NY.shape[1], cells)
    if columns < min(LEAST_COLUMNS, len(steps)):
        return None
    starts = bucket_starts(len(steps), columns)
    return pack(_means(column_NY, starts).T, _last_of(starts, steps))


def _means(column_NX: Floats, starts: NDArray[np.int64]) -> Floats:
    """`[P, ...]`: the mean of what is finite from each start to the next."""
    finite = np.isfinite(column_NX)
    counts_PX = np.add.reduceat(finite, starts, axis=0, dtype=np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means_PX: Floats = np.add.reduceat(np.where(finite, column_NX, 0.0), starts, axis=0) / counts_PX
    return means_PX


def _last_of(starts: NDArray[np.int64], steps: NDArray[np.int64]) -> NDArray[np.int64]:
    last: NDArray[np.int64] = steps[np.append(starts[1:], len(steps)) - 1]
    return last


def expert_map(run: Run, cells: int) -> dict[str, Any] | None:
    """Load of every expert over its fair share, layers below each other, from the snapshots that training keeps.

    Where there are more experts than rows, neighbours are merged, and have two rows: the least and the greatest of their loads.
    """
    tables = [(row["step"], row["expert_load"]) for row in run.snapshots if "expert_load" in row]
    if not tables:
        return None
    layers, experts = tables[-1][1].shape
    tables = [(step, load_YE) for step, load_YE in tables if load_YE.shape == (layers, experts)]
    merged = _merged(layers, experts, len(tables), cells)
    if merged is None:
        return None
    load_NYE = np.array([load_YE for _, load_YE in tables], np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share_NYE = load_NYE / load_NYE.mean(axis=2, keepdims=True)
    starts = bucket_starts(len(tables), columns_for(_rows(layers, experts, merged), cells))
    cells_PYG = _least_and_greatest(_means(share_NYE, starts), merged)
    packed = pack(cells_PYG.reshape(len(starts), -1).T, _last_of(starts, np.array([step for step, _ in tables], np.int64)))
    return {**packed, "layers": layers, "experts": experts, "merged": merged}


def _rows(layers: int, experts: int, merged: int) -> int:
    return layers * (experts if merged == 1 else 2 * math.ceil(experts / merged))


def _merged(layers: int, experts: int, steps: int, cells: int) -> int | None:
    """The fewest experts to a group, 1, 4, 8 ..., with which the map has columns enough; None where not even all of a layer."""
    sizes = [1, *itertools.takewhile(lambda size: size < experts, (4 << i for i in itertools.count())), experts]
    wanted = min(LEAST_COLUMNS, steps)
    return next((size for size in sizes if columns_for(_rows(layers, experts, size), cells) >= wanted), None)


def _least_and_greatest(share_PYE: Floats, merged: int) -> Floats:
    """Of each so many experts in turn. Of means over time: an expert without a token stays dark, a pause of one does not."""
    if merged == 1:
        return share_PYE
    firsts = np.arange(0, share_PYE.shape[2], merged)
    ends = [ufunc.reduceat(share_PYE, firsts, axis=2) for ufunc in (np.fmin, np.fmax)]
    return np.stack(ends, axis=3).reshape(*share_PYE.shape[:2], -1)


def heat_maps_of(run: Run, cells: int = CELLS) -> dict[str, Any]:
    """By metric, for the page; at most `cells` in each."""
    maps: dict[str, Any] = {"expert_load": expert_map(run, cells)}
    layers = per_layer_columns(run.train)
    for name in MAPS:
        column_NY = layers.get(name)
        if column_NY is not None and np.isfinite(column_NY).any():
            maps[name] = layer_map(column_NY, run.train.steps, cells)
    return {name: packed for name, packed in maps.items() if packed}
