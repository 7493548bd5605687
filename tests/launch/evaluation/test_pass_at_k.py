"""pass@k against counting all draws, its interval against the normal one."""

from __future__ import annotations

from itertools import combinations
from math import sqrt

import numpy as np
import pytest

from launch.evaluation.pass_at_k import interval, pass_at_k, summarize


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_pass(samples: int) -> None:
    for passed in range(samples + 1):
        for k in range(1, samples + 1):
            draws = list(combinations([1] * passed + [0] * (samples - passed), k))
            assert pass_at_k(samples, passed, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws), abs=1e-12)


def test_impossible_counts_are_refused() -> None:
    for samples, passed, k in ((1, 2, 1), (1, 0, 2), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match=f"pass@{k} of {samples} samples"):
            pass_at_k(samples, passed, k)


def test_the_interval_is_the_normal_one_for_many_problems() -> None:
    values = np.random.default_rng(1).random(400)
    low, high = interval(list(values))
    half = 1.96 * values.std() / sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize("problems", [1, 2, 164])
def test_equal_problems_leave_room_for_others(problems: int) -> None:
    """It was 0 to 0. With the bound for a share, as many draws without one are as rare as 2.5 %."""
    low, high = interval([0.0] * problems)
    assert low == 0 and (1 - high) ** problems == pytest.approx(0.025)
    assert interval([1.0] * problems) == pytest.approx((1 - high, 1))
    assert interval([0.25] * problems) == pytest.approx((0.25 * (1 - high), 0.25 + 0.75 * high))


def test_only_what_the_samples_allow() -> None:
    assert set(summarize([(10, 3), (12, 0)])) == {"pass@1", "pass@1_interval", "pass@10", "pass@10_interval"}
    assert "pass@10" not in summarize([(9, 3), (12, 0)]), "one problem has too few"
    assert summarize([(1, 1), (1, 0)])["pass@1"] == 0.5
