"""What a row of `metrics.jsonl` is called by a tracker: grouped names, few of them at the brief level.

Twenty-four layers times eight numbers would drown W&B's page and its limit of keys, so at the brief level a list over layers
becomes its least, mean, median, 90th percentile and greatest; the detailed level adds every layer.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

SPEED = frozenset({"tokens_per_second", "mfu", "memory_gb", "data_seconds", "step_seconds", "save_seconds"})
PROGRESS = frozenset({"samples", "tokens"})
#: Are told otherwise: the step is the axis, and what is text or a table is no curve.
NO_CURVE = frozenset({"step", "time", "skipped_samples", "expert_load", "load_max_over_mean"})


def group_of(name: str) -> str:
    if name.startswith("val_"):
        return "validation"
    if name in SPEED:
        return "speed"
    return "progress" if name in PROGRESS else "train"


def over_layers(name: str, values: list[float], *, detailed: bool) -> dict[str, float]:
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return {}
    found = {
        f"router/{name}/min": min(numbers),
        f"router/{name}/mean": statistics.fmean(numbers),
        f"router/{name}/median": statistics.median(numbers),
        f"router/{name}/p90": float(np.quantile(numbers, 0.9)),
        f"router/{name}/max": max(numbers),
    }
    if detailed:
        found.update({f"router_layers/{name}/{layer}": float(v) for layer, v in enumerate(values) if v is not None})
    return found


def grouped(row: dict[str, Any], *, detailed: bool) -> dict[str, float]:
    """`train/loss`, `validation/val_loss`, `speed/mfu`, `router/max_vio/median`, ...; what is not finite is left out."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if name in NO_CURVE or value is None:
            continue
        if isinstance(value, list):
            found.update(over_layers(name, value, detailed=detailed))
        elif isinstance(value, dict):
            found.update({f"train/{name}/{key}": float(number) for key, number in value.items() if number is not None})
        elif isinstance(value, (int, float)):
            found[name if "/" in name else f"{group_of(name)}/{name}"] = value
    if "loss" in row:
        found["train/skipped"] = float("skipped" in row)
    return {name: value for name, value in found.items() if math.isfinite(value)}
