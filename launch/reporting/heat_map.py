"""Heat maps, packed: one byte a cell between a least and a greatest value, as base64.

Shapes: N logged steps, P columns of a map, Y layers, E experts.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.reporting.columns import Floats, to_number
from launch.reporting.curves import bucket_starts, per_layer_columns
from launch.reporting.read import Run

COLUMNS = 320
LEAST_COLUMNS = 8  # a map that would get fewer is left out
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
    finite = np.isfinite(column_NY)
    counts_PY = np.add.reduceat(finite, starts, axis=0, dtype=np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        cells_PY = np.add.reduceat(np.where(finite, column_NY, 0.0), starts, axis=0) / counts_PY
    return pack(cells_PY.T, steps[np.append(starts[1:], len(steps)) - 1])


def expert_map(run: Run, cells: int) -> dict[str, Any] | None:
    """Load of every expert over its fair share, layers below each other, from the snapshots that training keeps."""
    tables = [(row["step"], _to_table(row["expert_load"])) for row in run.snapshots if _is_table(row.get("expert_load"))]
    if not tables:
        return None
    shape = tables[-1][1].shape
    tables = [(step, load_YE) for step, load_YE in tables if load_YE.shape == shape]
    load_NYE = np.array([load_YE for _, load_YE in tables])
    with np.errstate(invalid="ignore", divide="ignore"):
        share_NYE = load_NYE / load_NYE.mean(axis=2, keepdims=True)
    flat = share_NYE.reshape(len(tables), -1)
    steps = np.array([step for step, _ in tables], np.int64)
    packed = layer_map(flat, steps, cells)
    return {**packed, "experts": shape[1]} if packed else None


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) and len(row) == len(value[0]) for row in value)


def _to_table(rows: list[list[Any]]) -> Floats:
    return np.array([[to_number(cell) for cell in row] for row in rows])


def heat_maps_of(run: Run, cells: int = CELLS) -> dict[str, Any]:
    """By metric, for the page; at most `cells` in each."""
    maps: dict[str, Any] = {"expert_load": expert_map(run, cells)}
    layers = per_layer_columns(run.train)
    for name in MAPS:
        column_NY = layers.get(name)
        if column_NY is not None and np.isfinite(column_NY).any():
            maps[name] = layer_map(column_NY, run.train.steps, cells)
    return {name: packed for name, packed in maps.items() if packed}
