"""Slow formulas written out from the papers, to compare with. Imports nothing of ours.

Everything takes and returns tensors of any floating type; tests pass float64 where they can.
"""

import math

import torch
from torch import Tensor


def attention_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, allowed: Tensor) -> Tensor:
    """q [B, S, N, D], k and v [B, L, M, D], sinks [N], allowed [B, S, L] of bools -> [B, S, N, D].

    `out_i = sum_j exp(s_ij) v_j / (exp(sink) + sum_j exp(s_ij))`, one head at a time, the maximum taken off first.
    """
    heads, key_heads = q.shape[2], k.shape[2]
    out = []
    for head in range(heads):
        key_head = head // (heads // key_heads)
        scores = torch.einsum("bsd,bld->bsl", q[:, :, head], k[:, :, key_head]) / math.sqrt(q.shape[3])
        scores = torch.where(allowed, scores, torch.full_like(scores, -math.inf))
        highest = scores.amax(dim=-1, keepdim=True)
        if sinks is not None:
            highest = torch.maximum(highest, sinks[head])
        highest = highest.detach()
        weights = torch.exp(scores - highest)
        total = weights.sum(dim=-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks[head] - highest)
        out.append(torch.einsum("bsl,bld->bsd", weights / total, v[:, :, key_head]))
    return torch.stack(out, dim=2)


def allowed_pairs(positions: Tensor) -> Tensor:
    """[B, S] positions that restart at 0 in each document -> bool [B, S, S]: same document and not later."""
    batch, length = positions.shape
    allowed = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        start = 0
        for i in range(length):
            if positions[row, i] == 0:
                start = i
            allowed[row, i, start : i + 1] = True
    return allowed


def yarn_frequencies(
    dim: int, theta: float, factor: float, original: int, beta_fast: float = 32, beta_slow: float = 1
) -> list[float]:
    """Section 3.2 of arXiv 2309.00071 by dimension: gamma is 1 (keep) for many rotations, 0 (interpolate) for few.

    The paper defines the ramp over rotations; its published code, which models are trained with, over the dimension
    index between the rounded indices that turn beta_fast and beta_slow times. This is the latter.
    """

    def index_with_rotations(rotations: float) -> float:
        # theta^(2i/dim) = original / (2 pi rotations)
        return dim / 2 * math.log(original / (2 * math.pi * rotations)) / math.log(theta)

    first = max(math.floor(index_with_rotations(beta_fast)), 0)
    last = min(math.ceil(index_with_rotations(beta_slow)), dim - 1)
    frequencies = []
    for i in range(dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / dim)
        if i <= first:
            keep = 1.0
        elif i >= last:
            keep = 0.0
        else:
            keep = 1 - (i - first) / (last - first)
        frequencies.append(2 * math.pi / wavelength * (keep + (1 - keep) / factor))
    return frequencies


def rotate(x: Tensor, angles: Tensor, concentration: float = 1.0) -> Tensor:
    """x [..., D], angles [..., D/2]: each pair (x_i, x_{i+D/2}) as a complex number times e^(i angle)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.full_like(angles, concentration), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def route_token(
    logits: list[float],
    bias: list[float],
    top_k: int,
    n_group: int,
    topk_group: int,
    scoring: str,
    normalise: bool,
    scale: float,
) -> dict[int, float]:
    """DeepSeek-V3's gate for one token, {expert: weight}; among equals the lowest index.

    Groups are scored by the sum of their two best biased scores; experts outside the best groups cannot be chosen
    (their score is minus infinity); the weights are the scores without bias.
    """
    if scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        highest = max(logits)
        total = sum(math.exp(x - highest) for x in logits)
        scores = [math.exp(x - highest) / total for x in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_group)]

    def group_score(group: list[int]) -> float:
        return sum(sorted((biased[e] for e in group), reverse=True)[:2])

    best_groups = sorted(range(n_group), key=lambda g: (-group_score(groups[g]), g))[:topk_group]
    reachable = [e for g in best_groups for e in groups[g]]
    chosen = sorted(reachable, key=lambda e: (-biased[e], e))[:top_k]
    weight = {e: scores[e] for e in chosen}
    if normalise:
        total = sum(weight.values())
        weight = {e: w / total for e, w in weight.items()}
    return {e: w * scale for e, w in weight.items()}


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = x @ gate.T
    return (hidden / (1 + torch.exp(-hidden)) * (x @ up.T)) @ down.T


def mixture(x: Tensor, weights: list[dict[int, float]], gate_up: Tensor, down: Tensor) -> Tensor:
    """x [T, H], one {expert: weight} a token, gate_up [E, 2I, H] (gate above up), down [E, H, I] -> [T, H]."""
    width = down.shape[2]
    rows = []
    for token, chosen in zip(x, weights, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in chosen.items():
            row = row + weight * swiglu(token, gate_up[expert, :width], gate_up[expert, width:], down[expert])
        rows.append(row)
    return torch.stack(rows)


def bias_step(bias: list[float], load: list[int], rate: float) -> list[float]:
    """arXiv 2408.15664, algorithm 1, with the mean of the signs taken off."""
    mean = sum(load) / len(load)
    signs = [(mean > n) - (mean < n) for n in load]
    drift = sum(signs) / len(signs)
    return [b + rate * (s - drift) for b, s in zip(bias, signs, strict=True)]


def proportional_step(bias: list[float], load: list[int], rate: float) -> list[float]:
    """arXiv 2408.15664's variant, each violation in means of the load."""
    mean = sum(load) / len(load)
    return [b + rate * (mean - n) / mean if mean else b for b, n in zip(bias, load, strict=True)]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + eps) * weight


def cross_entropy(x: Tensor, head: Tensor, targets: Tensor, num_items: float, z_weight: float = 0.0) -> Tensor:
    """Sum over targets >= 0 of `-log softmax(x W^T)[target] + z_weight * log(sum exp)^2`, over num_items."""
    total = x.new_zeros(())
    for row, target in zip(x, targets.tolist(), strict=True):
        if target < 0:
            continue
        logits = head @ row
        log_sum = torch.log(torch.exp(logits - logits.detach().max()).sum()) + logits.detach().max()
        total = total + log_sum - logits[target] + z_weight * log_sum**2
    return total / num_items
