"""Numbers as a person reads them."""

from __future__ import annotations

import math

import pytest

from launch.words import BILLIONS, brief_duration, duration, short


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "0 seconds"),
        (1, "1 second"),
        (90, "90 seconds"),
        (2360, "39 minutes"),
        (35_280, "9.8 hours"),
        (449_280, "5.2 days"),
        (math.nan, "–"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(4, "0m04s"), (130, "2m10s"), (3600, "1h00m"), (11_100, "3h05m"), (356_400, "4d03h"), (59.9, "1m00s")]
)
def test_brief_durations(seconds: float, said: str) -> None:
    assert brief_duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(0.5, "0.5"), (7.0, "7"), (999.4, "999"), (999.6, "1k"), (316_025, "316k"), (999_999, "1M"), (8.3e12, "8.3T"), (2e18, "2E")],
)
def test_short_numbers(number: float, said: str) -> None:
    assert short(number) == said


def test_short_numbers_of_other_units_and_digits() -> None:
    """What rounds to a thousand of a unit is one of the next, whatever the digits."""
    assert [short(number, units=BILLIONS) for number in (812e6, 999.6e6, 4.38e9)] == ["812 M", "1 B", "4.38 B"]
    assert short(999_600) == "1M" and short(999_600, 4) == "999.6k" and short(-2e6, 4, BILLIONS) == "-2 M"
