"""The spike guard: decisions from numbers, and a resumed guard that judges as the uninterrupted one."""

from __future__ import annotations

import json
import math
import random

from launch.guard import LEAST_HISTORY, SpikeGuard, outlier


def guard(**changes: object) -> SpikeGuard:
    return SpikeGuard(**{"sigma": 6.0, "window": 64, "rollback_after": 3, **changes})


def test_only_far_above_the_mean_is_an_outlier() -> None:
    draw = random.Random(0)
    window = [3 + draw.gauss(0, 0.1) for _ in range(100)]
    mean = sum(window) / 100
    deviation = math.sqrt(sum((x - mean) ** 2 for x in window) / 100)
    assert outlier(mean + 6.01 * deviation, window, 6) and not outlier(mean + 5.99 * deviation, window, 6)
    assert not outlier(-100.0, window, 6)
    assert not outlier(100.0, window[: LEAST_HISTORY - 1], 6)
    assert not outlier(1.0005, [1.0] * 100, 6)  # a flat curve has no deviation; a thousandth of the mean stands in


def test_non_finite_is_refused_from_the_first_step() -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert guard(sigma=0).verdict(value, 1.0) == f"loss is {value}"
        assert guard(sigma=0).verdict(1.0, value) == f"gradient norm is {value}"
    assert guard(sigma=0).verdict(1e30, 1e30) is None


def test_a_restored_guard_judges_alike() -> None:
    draw, one = random.Random(1), guard()
    for _ in range(100):
        one.accept(2 + draw.random(), 1 + draw.random())
    one.skip()
    other = guard()
    other.restore(json.loads(json.dumps(one.state())))
    assert other == one and len(one.losses) == 64
    for loss in (2.5, 3.5, 4.5, 6.0, 9.0):
        assert other.verdict(loss, 1.5) == one.verdict(loss, 1.5)
    assert one.verdict(9.0, 1.5) and not one.verdict(2.5, 1.5)


def test_rollback_after_so_many_in_a_row() -> None:
    one = guard()
    assert [one.skip(), one.skip()] == [False, False]
    one.accept(1.0, 1.0)
    assert [one.skip(), one.skip(), one.skip()] == [False, False, True]
    assert one.skipped_in_all == 5
    assert not any(guard(rollback_after=0).skip() for _ in range(10))
