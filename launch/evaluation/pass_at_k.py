"""pass@k, unbiased, with an interval.

Chen et al. 2021 (arXiv 2107.03374), equation 1: of n samples of a problem c pass; k of them drawn without replacement contain one
that passes with probability 1 - C(n - c, k) / C(n, k), here as their product, which does not overflow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KS = (1, 10, 100)
RESAMPLES = 10_000
COVERAGE = 0.95


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Of one problem. Raises ValueError if there are fewer samples than k."""
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {passed} of which passed")
    if samples - passed < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - passed + 1, samples + 1)))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the mean: problems drawn with replacement, the middle 95 % of 10,000 means (Efron's percentile bootstrap).

    Draws of equal values show no spread. Then the bounds are those of Clopper and Pearson (1934, Biometrika 26, 404-413) for none
    in n: at most 1 - 0.025^(1/n) of all problems differ from these, and they by as much as can be. After 2 failures: 0 to 0.84.
    """
    numbers = np.asarray(values)
    if (numbers == numbers[0]).all():
        same, others = float(numbers[0]), 1 - ((1 - COVERAGE) / 2) ** (1 / len(numbers))
        return same * (1 - others), same + (1 - same) * others
    generator = np.random.default_rng(0)
    means = np.array([numbers[generator.integers(0, len(numbers), len(numbers))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def summarize(counts: Sequence[tuple[int, int]]) -> dict[str, float | list[float]]:
    """`pass@k` and `pass@k_interval` for each k that every problem has samples for. counts: (samples, passed) of each problem."""
    summary: dict[str, float | list[float]] = {}
    for k in KS:
        if k > min(samples for samples, _ in counts):
            break
        values = [pass_at_k(samples, passed, k) for samples, passed in counts]
        summary[f"pass@{k}"] = float(np.mean(values))
        summary[f"pass@{k}_interval"] = list(interval(values))
    return summary
