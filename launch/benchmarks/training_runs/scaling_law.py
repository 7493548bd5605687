"""Fits `L(N, D) = E + A / N^alpha + B / D^beta` as Chinchilla's section 3.3 does (arXiv 2203.15556): the Huber loss of the error
of log L, by L-BFGS from a grid of starts, over a = log A, b = log B, e = log E. Intervals are bootstrapped: losses drawn anew.

Shapes: S candidates, P points, 5 unknowns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from launch.planning.ladder import LARGEST_LOGARITHM, Law

HUBER = 1e-3
#: Of (a, b, e, alpha, beta); the paper's grid, thinned.
STARTS = tuple(itertools.product((2.0, 8.0, 14.0), (2.0, 8.0, 14.0), (-1.0, 0.0, 1.0), (0.3, 0.8), (0.3, 0.8)))
TRIED, KEPT = 12, 4  # starts that are followed for a while, and to the end
UNKNOWNS = 5
TRIES = 10
TO_THE_END = 1000  # steps; most starts end after some eighty


Point = tuple[float, float, float]  # active parameters, tokens, loss (or bits per byte)


def fit(points: Sequence[Point]) -> Law:
    """Raises ValueError where the points cannot tell the five numbers apart."""
    if not _identifies(points):
        raise ValueError(f"a scaling law needs losses of three sizes and three token counts at least, got {len(points)} of fewer")
    sizes, tokens, losses = (torch.tensor(column, dtype=torch.float64).log() for column in zip(*points, strict=True))
    starts = torch.tensor(STARTS, dtype=torch.float64)
    starts = starts[_errors(starts, sizes, tokens, losses).argsort()[:TRIED]]
    found = _minimize(starts, sizes, tokens, losses, steps=60)
    best = found[_errors(found, sizes, tokens, losses).argsort()[:KEPT]]
    best = _minimize(best, sizes, tokens, losses, steps=TO_THE_END)
    law = _law(best[_errors(best, sizes, tokens, losses).argmin()])
    if law is None:
        raise ValueError("no law of this form fits these losses: its factors leave what a float holds")
    return law


def bootstrap(points: Sequence[Point], law: Law, *, draws: int) -> list[Law]:
    """Laws through losses drawn about `law` at the same sizes and tokens, each begun at `law`.

    The noise of log L is normal. Its variance is what the residuals leave open: the sum of their squares over a chi-squared of
    P - 5 degrees of freedom, drawn each time. (Points drawn with replacement take many points; of nine only four degrees are left.)
    Draws that cannot be fitted are drawn again, up to `TRIES` times as many: fewer laws than `draws` may come out.
    """
    generator = np.random.default_rng(0)
    start = torch.tensor([[np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta]], dtype=torch.float64)
    sizes, tokens, losses = (torch.tensor(column, dtype=torch.float64).log() for column in zip(*points, strict=True))
    expected = _predicted(start, sizes, tokens)[0]
    squares, free = float((losses - expected).square().sum()), max(1, len(points) - UNKNOWNS)
    laws: list[Law] = []
    for _ in range(TRIES * draws):
        if len(laws) == draws:
            break
        noise = math.sqrt(squares / generator.chisquare(free)) * torch.from_numpy(generator.normal(size=len(points)))
        if found := _law(_minimize(start, sizes, tokens, expected + noise, steps=TO_THE_END)[0]):
            laws.append(found)
    return laws


def _identifies(points: Sequence[Point]) -> bool:
    """A and alpha need two differences between sizes, B and beta two between token counts; E then has the level."""
    return min(len({n for n, _, _ in points}), len({d for _, d, _ in points})) >= 3


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
    n, d = sizes_P.mean(), tokens_P.mean()  # about the middle of the data a factor and its exponent hardly depend on each other
    shift_55 = torch.eye(UNKNOWNS, dtype=torch.float64)
    shift_55[0, 3], shift_55[1, 4] = -n, -d
    found = [_descend(start, sizes_P - n, tokens_P - d, losses_P, steps) for start in starts_S5 @ shift_55.T]
    done_S5 = torch.stack(found) @ shift_55.inverse().T
    return torch.where(done_S5.isfinite().all(dim=1, keepdim=True), done_S5, starts_S5)


def _descend(start_5: Tensor, sizes_P: Tensor, tokens_P: Tensor, losses_P: Tensor, steps: int) -> Tensor:
    """The gradient by hand: autograd's bookkeeping takes longer than five numbers."""
    theta_5 = start_5.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta_5], max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )
    zero_P, one_P = torch.zeros_like(sizes_P), torch.ones_like(sizes_P)
    terms_3P5 = torch.stack(  # the logarithms of A / N^alpha, B / D^beta and E are linear in theta
        [
            torch.stack([one_P, zero_P, zero_P, -sizes_P, zero_P], dim=1),
            torch.stack([zero_P, one_P, zero_P, zero_P, -tokens_P], dim=1),
            torch.stack([zero_P, zero_P, one_P, zero_P, zero_P], dim=1),
        ]
    )

    @torch.no_grad()
    def closure() -> Tensor:
        logs_3P = terms_3P5 @ theta_5
        predicted_P = logs_3P.logsumexp(dim=0)
        error_P = predicted_P - losses_P
        slope_P = error_P.clamp(-HUBER, HUBER)  # of Huber's loss, which is slope * (error - slope / 2)
        theta_5.grad = ((logs_3P - predicted_P).exp() * slope_P).flatten() @ terms_3P5.flatten(0, 1) / HUBER
        return (slope_P * (error_P - slope_P / 2)).sum() / HUBER

    optimizer.step(closure)
    return theta_5.detach()


def _law(theta: Tensor) -> Law | None:
    """None where a factor is more than a float holds."""
    a, b, e, alpha, beta = theta.tolist()
    if max(a, b, e) > LARGEST_LOGARITHM:
        return None
    return Law(A=math.exp(a), B=math.exp(b), E=math.exp(e), alpha=alpha, beta=beta)
