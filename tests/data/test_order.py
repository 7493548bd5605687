"""Sample order: a permutation for every size, seed and epoch; no state; blends with exact counts."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import blend_counts, blend_slots, ceil_div, earlier_slots, permute, permute_epochs

GOLDEN_10 = [1, 9, 4, 5, 8, 2, 0, 6, 7, 3]
GOLDEN_LARGE = [16959958, 15257981, 15699258, 23895599]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


def test_seeds_and_epochs_give_other_orders_and_the_same_ones_again() -> None:
    n = 1000
    orders = [permute(np.arange(n), n, seed, epoch) for seed in range(6) for epoch in range(6)]
    assert len({order.tobytes() for order in orders}) == 36
    assert np.array_equal(orders[7], permute(np.arange(n), n, 1, 1))
    assert np.array_equal(permute(np.array([5, 900, 5]), n, 1, 1), orders[7][[5, 900, 5]])


def test_it_is_the_same_on_every_machine() -> None:
    """Golden values: another order would make every resumed run read other samples."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == GOLDEN_10
    assert permute(np.arange(4), 48_828_125, 1234, 3).tolist() == GOLDEN_LARGE


def test_it_looks_random() -> None:
    """Against what uniform permutations give: fixed points and neighbours kept are Poisson(1), each place equally likely."""
    n, orders = 50, np.array([permute(np.arange(50), 50, seed, epoch) for seed in range(40) for epoch in range(50)])
    fixed = (orders == np.arange(n)).sum(1)
    followers = (np.diff(orders, axis=1) % n == 1).sum(1)
    for counts in (fixed, followers):
        assert abs(counts.mean() - 1) < 4 / np.sqrt(len(orders)) + 0.03 and 0.8 < counts.var() < 1.25
    seen = np.zeros((n, n))
    for order in orders:
        seen[np.arange(n), order] += 1
    mean = len(orders) / n
    chi2 = ((seen - mean) ** 2 / mean).sum() / (n - 1) ** 2
    assert 0.85 < chi2 < 1.15
    large = permute(np.arange(100_000), 100_000, 0, 0)
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.015


@given(st.integers(1, 500), st.lists(st.integers(0, 5000), max_size=50), st.integers(0, 100))
def test_batches_across_epochs_equal_single_numbers(n: int, numbers: list[int], seed: int) -> None:
    together = permute_epochs(np.array(numbers, np.int64), n, seed).tolist()
    assert together == [int(permute(np.array([i % n]), n, seed, i // n)[0]) for i in numbers]


def test_a_trillion_samples_cost_what_a_thousand_do() -> None:
    """In memory, which holds for time too: a table of 10**9 samples would be 8 GB."""
    tracemalloc.start()
    for n in (10**3, 10**6, 10**9, 10**12):
        assert permute(np.arange(16), n, 0, 0).max() < n
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=5))
def test_blend_counts_are_exact_and_even(weights: list[float]) -> None:
    table = blend_slots(weights)
    counts = np.bincount(table, minlength=len(weights))
    assert counts.sum() == len(table)
    assert len(table) < 1000 + len(weights) and (counts > 0).all()
    assert np.allclose(counts / len(table), np.array(weights) / sum(weights), atol=0.001 * len(weights))
    for k in range(len(weights)):
        running = np.cumsum(table == k)
        ideal = np.arange(1, len(table) + 1) * counts[k] / len(table)
        assert np.abs(running - ideal).max() < len(weights)


@pytest.mark.parametrize(("weights", "counts"), [([0.7, 0.3], [7, 3]), ([1, 1, 2], [1, 1, 2]), ([5], [1]), ([0.125, 0.5], [1, 4])])
def test_weights_are_taken_literally(weights: list[float], counts: list[int]) -> None:
    table = blend_slots(weights)
    assert np.bincount(table).tolist() == counts
    assert earlier_slots(table).tolist() == [int((table[:i] == k).sum()) for i, k in enumerate(table)]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([0.3333, 0.5433, 0.1234], [333, 543, 124]),  # 333.3, 543.3 and 123.4 of a thousand: one is left
        ([0.3333, 0.3338, 0.3329], [333, 334, 333]),  # 333.3, 333.8 and 332.9: two are
        ([0.99999, 0.00001], [999, 1]),
        ([0.99997, 0.00001, 0.00001, 0.00001], [999, 1, 1, 1]),  # one each is two too many: the period is longer
    ],
)
def test_a_blend_without_a_short_period_goes_by_largest_remainders(weights: list[float], counts: list[int]) -> None:
    assert blend_counts(weights) == counts


@given(st.integers(0, 10**30), st.integers(1, 10**20))
def test_ceil_div_is_exact_where_floats_are_not(number: int, divisor: int) -> None:
    assert (ceil_div(number, divisor) - 1) * divisor < number <= ceil_div(number, divisor) * divisor
