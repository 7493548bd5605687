"""What the checks of a run share: a flag, and how a trend is read from noisy numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from launch.reporting.columns import Floats, to_number

LEVELS = ("bad", "look", "note")
LEAST_ROWS = 40  # a trend is judged from this many logged steps on
WINDOWS = 20
SHOWN = 4  # steps that a flag names


@dataclass(frozen=True, kw_only=True)
class Flag:
    """`level`: bad (act now), look (have a look), note (good to know)."""

    level: str
    title: str
    detail: str
    advice: str


def window_medians(column: Floats) -> Floats:
    """Medians of WINDOWS equal parts of what is finite; empty where there is too little."""
    values = column[np.isfinite(column)]
    if len(values) < LEAST_ROWS:
        return np.zeros(0)
    return np.array([np.median(part) for part in np.array_split(values, WINDOWS)])


def last_part(column: Floats) -> Floats:
    """Its last tenth."""
    return column[-max(1, int(len(column) * 0.1)) :]


def some_steps(steps: list[int]) -> str:
    """`12, 40, 41, 52 and 9 more`"""
    shown = ", ".join(f"{step:,}" for step in steps[:SHOWN])
    return shown + (f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else "")


def is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    return math.isfinite(to_number(value))
