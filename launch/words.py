"""Numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from data.cli import counted

SECONDS_PER_DAY = 86_400
#: Of the metric system, and as counts of parameters and tokens are read; largest first.
UNITS = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
BILLIONS = ((" T", 1e12), (" B", 1e9), (" M", 1e6), (" K", 1e3))


def duration(seconds: float) -> str:
    """In the unit that a person would use: `43 seconds`, `39 minutes`, `9.8 hours`, `5.2 days`; a dash where there is none."""
    if not math.isfinite(seconds):
        return "–"
    for unit, size, digits in (("days", SECONDS_PER_DAY, 1), ("hours", 3600, 1), ("minutes", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{digits}f} {unit}"
    return counted(round(seconds), "second")


def brief_duration(seconds: float) -> str:
    """Two units: 4d03h, 3h05m, 2m10s."""
    total = round(seconds)
    for high, low, size, part in (("d", "h", SECONDS_PER_DAY, 3600), ("h", "m", 3600, 60)):
        if total >= size:
            return f"{total // size}{high}{total % size // part:02d}{low}"
    return f"{total // 60}m{total % 60:02d}s"


def short(number: float, digits: int = 3, units: Sequence[tuple[str, float]] = UNITS) -> str:
    """So many digits and a unit: `316k`, `1.64M`, `8.3T`."""
    for unit, size in units:
        if abs(number) >= (1 - 0.5 * 10**-digits) * size:  # what rounds to a thousand of a unit is one of the next
            return f"{number / size:.{digits}g}{unit}"
    return f"{number:.{digits}g}"


def gigabytes(size: float) -> str:
    """28GB, 1.2GB."""
    return f"{size / 1e9:.0f}GB" if size >= 9.95e9 else f"{size / 1e9:.1f}GB"


def step_of_last(step: int, last: int) -> str:
    """`1200/100k`."""
    return f"{step}/{last // 1000}k" if last >= 10_000 and last % 1000 == 0 else f"{step}/{last}"
