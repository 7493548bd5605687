"""Rows of metrics as columns of numbers.

Shapes: N logged steps, Y layers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Names of metrics that are read; a run's own are some sixty.
MOST_NAMES = 1000

Floats = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(kw_only=True)
class Columns:
    """The logged steps in order, each once: one number a step in `scalars` `[N]`, one a layer and step in `layers` `[N, Y]`.
    `skipped` `[N]`: the step was not taken."""

    steps: NDArray[np.int64]
    scalars: dict[str, Floats]
    layers: dict[str, Floats]
    skipped: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.steps)

    def get(self, name: str) -> Floats:
        """The column, or NaN where the run has none of that name."""
        return self.scalars.get(name, np.full(len(self), np.nan))

    def where(self, keep: NDArray[np.bool_]) -> Columns:
        """The steps of which `keep` `[N]` is true."""
        return Columns(
            steps=self.steps[keep],
            scalars={name: column[keep] for name, column in self.scalars.items()},
            layers={name: column[keep] for name, column in self.layers.items()},
            skipped=self.skipped[keep],
        )


def to_number(value: Any) -> float:
    """NaN for what is no number. A metric that was not finite may be written as null, as text or as NaN."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # a whole number of hundreds of digits
            return math.nan
    if isinstance(value, str) and value.lstrip("+-").lower() in ("inf", "infinity"):
        return -math.inf if value.startswith("-") else math.inf
    return math.nan


def to_table(value: Any) -> NDArray[np.float32] | None:
    """A list of equally long lists, one a layer, in a fiftieth of their memory; None for anything else."""
    if not (isinstance(value, list) and value and all(isinstance(row, list) and len(row) == len(value[0]) for row in value)):
        return None
    if not value[0]:  # no expert
        return None
    table_YE = np.array(value) if {type(cell) for row in value for cell in row} <= {int, float} else None
    with np.errstate(over="ignore"):
        if table_YE is None or table_YE.dtype == object:  # a cell that is no number, or one of hundreds of digits
            table_YE = np.array([[to_number(cell) for cell in row] for row in value])
        return table_YE.astype(np.float32)


def to_columns(rows: list[Row]) -> Columns:
    """Rows as columns; a key that a row lacks is NaN there."""
    keys: dict[str, Any] = {}
    for row in rows:
        keys.update(row)
    keys.pop("step", None)
    keys = dict(itertools.islice(keys.items(), MOST_NAMES))
    names = [k for k, v in keys.items() if not isinstance(v, (list, str, dict)) or k in ("loss", "grad_norm")]
    scalars = {name: np.array([to_number(row.get(name)) for row in rows], np.float64) for name in names}
    layers = {name: _per_layer(rows, name, len(v)) for name, v in keys.items() if _is_per_layer(name, v)}
    steps, skipped = np.array([row["step"] for row in rows], np.int64), np.array(["skipped" in row for row in rows], np.bool_)
    return Columns(steps=steps, scalars=scalars, layers=layers, skipped=skipped)


def _is_per_layer(name: str, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and name != "skipped_samples" and isinstance(value[0], (int, float))


def _per_layer(rows: list[Row], name: str, width: int) -> Floats:
    missing = [math.nan] * width
    lists = [row.get(name) for row in rows]
    try:
        return np.array([v if isinstance(v, list) and len(v) == width else missing for v in lists], np.float64)
    except (TypeError, ValueError):  # a null among the numbers
        return np.array([[to_number(x) for x in v] if isinstance(v, list) and len(v) == width else missing for v in lists])


def join(blocks: list[Columns]) -> Columns:
    """One after the other; a column that a block lacks is NaN there."""
    if not blocks:
        return Columns(steps=np.zeros(0, np.int64), scalars={}, layers={}, skipped=np.zeros(0, np.bool_))
    scalar_names = list(dict.fromkeys(name for block in blocks for name in block.scalars))[:MOST_NAMES]
    widths = {name: column.shape[1] for block in blocks for name, column in block.layers.items()}
    layers = {}
    for name, width in widths.items():
        fits = [b.layers[name] if name in b.layers and b.layers[name].shape[1] == width else None for b in blocks]
        layers[name] = np.concatenate(
            [np.full((len(b), width), np.nan) if f is None else f for b, f in zip(blocks, fits, strict=True)]
        )
    return Columns(
        steps=np.concatenate([block.steps for block in blocks]),
        scalars={name: np.concatenate([block.get(name) for block in blocks]) for name in scalar_names},
        layers=layers,
        skipped=np.concatenate([block.skipped for block in blocks]),
    )
