"""Fits `L(N, D) = E + A / N^alpha + B / D^beta` as Chinchilla's section 3.3 does (arXiv 2203.15556): the Huber loss of the error
of log L, by L-BFGS from a grid of starts, over a = log A, b = log B, e = log E. Intervals are bootstrapped over runs.

Shapes: S candidates, P points, 5 unknowns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.planning.ladder import LARGEST_LOGARITHM, Law

HUBER = 1e-3
#: Of (a, b, e, alpha, beta); the paper's grid, thinned.
STARTS = tuple(itertools.product((2.0, 8.0, 14.0), (2.0, 8.0, 14.0), (-1.0, 0.0, 1.0), (0.3, 0.8), (0.3, 0.8)))
TRIED, KEPT = 12, 4  # starts that are followed for a while, and to the end
TRIES = 10


Point = tuple[float, float, float]  # active parameters, tokens, loss (or bits per byte)


def fit(points: Sequence[Point]) -> Law:
    """Raises ValueError where the points cannot tell the five numbers apart."""
    if len(points) < 5 or len({n for n, _, _ in points}) < 2 or len({d for _, d, _ in points}) < 2:
        raise ValueError(f"a scaling law needs five losses or more, of two sizes and two token counts, got {len(points)}")
    sizes, tokens, losses = (torch.tensor(column, dtype=torch.float64).log() for column in zip(*points, strict=True))
    starts = torch.tensor(STARTS, dtype=torch.float64)
    starts = starts[_errors(starts, sizes, tokens, losses).argsort()[:TRIED]]
    found = _minimize(starts, sizes, tokens, losses, steps=60)
    best = found[_errors(found, sizes, tokens, losses).argsort()[:KEPT]]
    best = _minimize(best, sizes, tokens, losses, steps=400)
    law = _law(best[_errors(best, sizes, tokens, losses).argmin()])
    if law is None:
        raise ValueError("no law of this form fits these losses: its factors leave what a float holds")
    return law


def bootstrap(points: Sequence[Point], law: Law, *, draws: int, seed: int = 0) -> list[Law]:
    """Laws of as many points drawn with replacement, each begun at `law`. Draws that cannot be fitted are drawn again, up to
    `TRIES` times as many: fewer laws than `draws` may come out."""
    generator = np.random.default_rng(seed)
    start = torch.tensor([[np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta]], dtype=torch.float64)
    laws: list[Law] = []
    for _ in range(TRIES * draws):
        if len(laws) == draws:
            break
        drawn = [points[i] for i in generator.integers(len(points), size=len(points))]
        if len({n for n, _, _ in drawn}) < 2 or len({d for _, d, _ in drawn}) < 2:
            continue
        columns = (torch.tensor(column, dtype=torch.float64).log() for column in zip(*drawn, strict=True))
        if found := _law(_minimize(start, *columns, steps=100)[0]):
            laws.append(found)
    return laws


def _predicted(theta_S5: Tensor, sizes_P: Tensor, tokens_P: Tensor) -> Tensor:
    """log L `[S, P]` of S candidates at P points, from logarithms."""
    a, b, e, alpha, beta = theta_S5.unbind(dim=1)
    terms = [a[:, None] - alpha[:, None] * sizes_P, b[:, None] - beta[:, None] * tokens_P, e[:, None].expand(-1, len(sizes_P))]
    return torch.stack(terms).logsumexp(dim=0)


def _errors(theta_S5: Tensor, sizes_P: Tensor, tokens_P: Tensor, losses_P: Tensor) -> Tensor:
    predicted_SP = _predicted(theta_S5, sizes_P, tokens_P)
    wanted_SP = losses_P.expand_as(predicted_SP)
    errors_S: Tensor = torch.nn.functional.huber_loss(predicted_SP, wanted_SP, reduction="none", delta=HUBER).sum(dim=1)
    return errors_S


def _minimize(starts_S5: Tensor, sizes_P: Tensor, tokens_P: Tensor, losses_P: Tensor, *, steps: int) -> Tensor:
    """Each start by itself: one L-BFGS over all would tie their step sizes together."""
    out = []
    for start in starts_S5:
        theta = start.clone().unsqueeze(0).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure(theta: Tensor = theta, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            error = _errors(theta, sizes_P, tokens_P, losses_P).sum() / HUBER
            error.backward()
            return error

        optimizer.step(closure)
        done = theta.detach()[0]
        out.append(done if bool(done.isfinite().all()) else start)
    return torch.stack(out)


def _law(theta: Tensor) -> Law | None:
    """None where a factor is more than a float holds."""
    a, b, e, alpha, beta = theta.tolist()
    if max(a, b, e) > LARGEST_LOGARITHM:
        return None
    return Law(A=math.exp(a), B=math.exp(b), E=math.exp(e), alpha=alpha, beta=beta)
