"""The spike guard: decisions from numbers, and a resumed guard that judges as the uninterrupted one."""

from __future__ import annotations

import json
import math
import random

from launch.run.spikes import LEAST_HISTORY, SpikeDetector, outlier


def guard(**changes: object) -> SpikeDetector:
    return SpikeDetector(**{"sigma": 6.0, "window": 64, "rollback_after": 3, **changes})


def test_only_far_above_the_mean_is_an_outlier() -> None:
    draw = random.Random(0)
    window = [3 + draw.gauss(0, 0.1) for _ in range(100)]
    mean = sum(window) / 100
    deviation = math.sqrt(sum((x - mean) ** 2 for x in window) / 100)
    assert outlier(mean + 6.01 * deviation, window, 6) and not outlier(mean + 5.99 * deviation, window, 6)
    assert not outlier(-100.0, window, 6)
    assert not outlier(100.0, window[: LEAST_HISTORY - 1], 6) and outlier(100.0, window[:LEAST_HISTORY], 6)
    assert outlier(1.0001, [1.0] * 100, 6) and not outlier(1.0001, [1.0] * 100, 6, least=0.01)


def test_a_flat_curve_s_next_wiggle_is_no_spike() -> None:
    one = guard()
    for _ in range(50):
        one.accept_step(2.0, 0.5)
    assert one.reason_to_skip(2.11, 0.9) is None
    assert one.reason_to_skip(2.13, 0.5) == "loss 2.13 is over 6 sigma above its mean 2 of 50 steps"
    assert one.reason_to_skip(2.0, 0.95) == "gradient norm 0.95 is over 6 sigma above its mean 0.5 of 50 steps"


def test_norms_spread_by_factors() -> None:
    draw, one = random.Random(2), guard()
    norms = [math.exp(draw.gauss(-0.5, 0.4)) for _ in range(64)]
    for norm in norms:
        one.accept_step(2.0, norm)
    mean = sum(map(math.log, norms)) / 64
    deviation = math.sqrt(sum((math.log(x) - mean) ** 2 for x in norms) / 64)
    assert one.reason_to_skip(2.0, math.exp(mean + 5.99 * deviation)) is None
    assert one.reason_to_skip(2.0, math.exp(mean + 6.01 * deviation))


def test_a_norm_of_zero_is_none_that_is_far_out() -> None:
    """Zero has no logarithm."""
    one = guard()
    for _ in range(50):
        one.accept_step(2.0, 0.5)
    assert one.reason_to_skip(2.0, 0.0) is None
    one.accept_step(2.0, 0.0)
    assert one.reason_to_skip(2.0, 0.5) is None and one.reason_to_skip(2.0, 1e30)


def test_a_search_for_the_loss_scale_is_no_row_of_spikes() -> None:
    one = guard(rollback_after=2)
    one.skip_step()
    assert not any(one.skip_step(in_a_row=False) for _ in range(5))
    assert (one.skipped_in_a_row, one.skipped_in_all) == (1, 6) and one.skip_step()


def test_forgetting_begins_anew() -> None:
    one = guard()
    for _ in range(50):
        one.accept_step(2.0, 0.5)
    assert one.reason_to_skip(4.0, 0.5)
    one.skip_step()
    one.forget_history()
    assert one.reason_to_skip(4.0, 0.5) is None and one.reason_to_skip(math.nan, 0.5)
    assert [one.skip_step() for _ in range(3)] == [False, False, True], "and a row of skipped steps too"


def test_non_finite_is_refused_from_the_first_step() -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert guard(sigma=0).reason_to_skip(value, 1.0) == f"loss is {value}"
        assert guard(sigma=0).reason_to_skip(1.0, value) == f"gradient norm is {value}"
    assert guard(sigma=0).reason_to_skip(1e30, 1e30) is None


def test_a_restored_guard_judges_alike() -> None:
    draw, one = random.Random(1), guard()
    for _ in range(100):
        one.accept_step(2 + draw.random(), 1 + draw.random())
    one.skip_step()
    other = guard()
    other.restore(json.loads(json.dumps(one.state())))
    assert other == one and len(one.losses) == 64
    for loss in (2.5, 3.5, 4.5, 6.0, 9.0):
        assert other.reason_to_skip(loss, 1.5) == one.reason_to_skip(loss, 1.5)
    assert one.reason_to_skip(9.0, 1.5) and not one.reason_to_skip(2.5, 1.5)


def test_a_resume_with_a_smaller_window_judges_by_that_many() -> None:
    n = 40
    one = guard()
    for step in range(64):
        one.accept_step(5.0 if step < 64 - n else 2.0, 0.1 if step < 64 - n else 1.0)
    assert one.reason_to_skip(5.0, 1.0) is None and one.reason_to_skip(2.0, 5.0) is None
    smaller, off = guard(window=n), guard(window=0)
    for other in (smaller, off):
        other.restore(json.loads(json.dumps(one.state())))
    assert smaller.reason_to_skip(5.0, 1.0) and smaller.reason_to_skip(2.0, 5.0), "its window has seen neither"
    assert off.reason_to_skip(1e30, 1e30) is None and (off.losses, off.norms) == ([], [])


def test_the_window_holds_the_latest_steps() -> None:
    """By the first ones nothing of a curve that has fallen from 4 to 2 would be far out until it is at 4 again."""
    one = guard(window=64)
    for step in range(200):
        one.accept_step(*((4.0, 4.0) if step < 100 else (2.0, 0.5)))
    assert (one.losses, one.norms) == ([2.0] * 64, [0.5] * 64)
    assert one.reason_to_skip(2.3, 0.5) and one.reason_to_skip(2.0, 2.0)


def test_rollback_after_so_many_in_a_row() -> None:
    one = guard()
    assert [one.skip_step(), one.skip_step()] == [False, False]
    one.accept_step(1.0, 1.0)
    assert [one.skip_step(), one.skip_step(), one.skip_step()] == [False, False, True]
    assert one.skipped_in_all == 5
    assert not any(guard(rollback_after=0).skip_step() for _ in range(10))


def test_a_rollback_begins_a_new_row_and_forgets_no_skipped_step() -> None:
    one = guard()
    one.skip_step()
    one.begin_after_rollback(5)
    assert (one.skipped_in_all, one.skipped_in_a_row) == (5, 0)
