"""The router in one pass over its input, and its gradient in two: logits, scores and choice in fp32, no fp32 copy of the input.

Shapes: T tokens, H hidden, E experts, K experts per token, G expert groups, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import SHARES
from .norm import column_sums

#: Tokens of a program, and columns of x that it takes at once.
TOKENS, COLUMNS = 16, 64


@triton.jit
def _best(values, ids, E: tl.constexpr):
    """Of each row the index of its highest value, the lowest among equals."""
    highest = tl.max(values, axis=1)
    return tl.minimum(tl.min(tl.where(values == highest[:, None], ids, E), axis=1), E - 1)


@triton.jit
def _limited(biased, ids, E: tl.constexpr, G: tl.constexpr, TOPK_G: tl.constexpr, TOKENS: tl.constexpr):
    """`biased`, -inf outside of the best groups; the groups' scores, sums of their two best; the same, -inf for the best groups."""
    group = ids // (E // G)
    groups = tl.arange(0, G)[None, :]
    scores = tl.zeros((TOKENS, G), dtype=tl.float32)
    for g in tl.static_range(G):
        inside = tl.where(group == g, biased, float("-inf"))
        first = _best(inside, ids, E)
        second = tl.max(tl.where(ids == first[:, None], float("-inf"), inside), axis=1)
        scores = tl.where(groups == g, (tl.max(inside, axis=1) + second)[:, None], scores)
    allowed = tl.zeros((TOKENS, E), dtype=tl.int32)
    left_out = scores
    for _ in tl.static_range(TOPK_G):
        chosen = _best(left_out, groups + tl.zeros((TOKENS, G), dtype=tl.int32), G)
        allowed = tl.where(group == chosen[:, None], 1, allowed)
        left_out = tl.where(groups == chosen[:, None], float("-inf"), left_out)
    return tl.where(allowed == 1, biased, float("-inf")), scores, left_out


@triton.jit
def _scores(logits, SIGMOID: tl.constexpr):
    if SIGMOID:
        return 1 / (1 + tl.exp(-logits))
    shifted = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return shifted / tl.sum(shifted, axis=1)[:, None]


@triton.jit
def router_kernel(
    x, weight, bias, replay, logits, weights, indices, counts, tokens, hidden, factor,
    E: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TOPK_G: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr,
    REPLAY: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = t < tokens
    e = tl.arange(0, E)
    ids = e[None, :] + tl.zeros((TOKENS, E), dtype=tl.int32)
    total = tl.zeros((TOKENS, E), dtype=tl.float32)
    for start in range(0, hidden, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        here = cols < hidden
        rows = t.to(tl.int64)[:, None] * hidden + cols[None, :]
        tile = tl.load(x + rows, mask=inside[:, None] & here[None, :], other=0.0).to(tl.float32)
        w = tl.load(weight + e[:, None] * hidden + cols[None, :], mask=here[None, :] & (e >= 0)[:, None], other=0.0).to(tl.float32)
        total += tl.sum(tile[:, None, :] * w[None, :, :], axis=2)
    tl.store(logits + t[:, None] * E + e[None, :], total, mask=inside[:, None])
    scores = _scores(total, SIGMOID)
    biased = scores + tl.load(bias + e)[None, :]
    if G > 1:
        biased, _, _ = _limited(biased, ids, E, G, TOPK_G, TOKENS)
    place = tl.arange(0, PLACES)[None, :]
    choice = tl.zeros((TOKENS, PLACES), dtype=tl.int32)
    weight_of = tl.zeros((TOKENS, PLACES), dtype=tl.float32)
    hits = tl.zeros((TOKENS, E), dtype=tl.int32)
    for k in tl.static_range(K):
        if REPLAY:
            chosen = tl.load(replay + t * K + k, mask=inside, other=0).to(tl.int32)
        else:
            chosen = _best(biased, ids, E)
            biased = tl.where(ids == chosen[:, None], float("-inf"), biased)
        score = tl.sum(tl.where(ids == chosen[:, None], scores, 0.0), axis=1)
        hits += ((ids == chosen[:, None]) & inside[:, None]).to(tl.int32)
        choice = tl.where(place == k, chosen[:, None], choice)
        weight_of = tl.where(place == k, score[:, None], weight_of)
    if NORM:
        weight_of /= tl.sum(weight_of, axis=1)[:, None] + 1e-20
    at, here = t[:, None] * K + place, inside[:, None] & (place < K)
    tl.store(indices + at, choice.to(tl.int64), mask=here)
    tl.store(weights + at, weight_of * factor, mask=here)
    tl.atomic_add(counts + e, tl.sum(hits, axis=0).to(tl.int64))


@triton.jit
def lift_kernel(
    logits, bias, histogram, tokens,
    E: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TOPK_G: tl.constexpr, SIGMOID: tl.constexpr, BINS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = t < tokens
    e = tl.arange(0, E)
    ids = e[None, :] + tl.zeros((TOKENS, E), dtype=tl.int32)
    bias = tl.load(bias + e)
    biased = _scores(tl.load(logits + t[:, None] * E + e[None, :], mask=inside[:, None], other=0.0), SIGMOID) + bias[None, :]
    lift = tl.full((TOKENS, E), float("-inf"), dtype=tl.float32)
    open_to = biased
    if G > 1:
        open_to, scores, left_out = _limited(biased, ids, E, G, TOPK_G, TOKENS)
        if TOPK_G < G:
            for g in tl.static_range(G):
                score = tl.sum(tl.where(tl.arange(0, G)[None, :] == g, scores, 0.0), axis=1)
                lift = tl.where(ids // (E // G) == g, ((tl.max(left_out, axis=1) - score) / 2)[:, None], lift)
    if K < E // G * TOPK_G:
        for _ in tl.static_range(K):
            open_to = tl.where(ids == _best(open_to, ids, E)[:, None], float("-inf"), open_to)
        lift = tl.maximum(lift, tl.max(open_to, axis=1)[:, None] - biased)
    part = tl.clamp(lift / (tl.max(bias, axis=0) - tl.min(bias, axis=0) + 1), -1.0, 1.0)
    root = tl.exp2(tl.log2(tl.abs(part)) / 3)
    bins = ((tl.where(part < 0, -root, root) + 1) * (BINS / 2)).to(tl.int32)
    one = tl.full((TOKENS, E), 1, dtype=tl.int64)
    tl.atomic_add(histogram + ids * BINS + tl.minimum(bins, BINS - 1), one, mask=inside[:, None] & (ids >= 0))


@triton.jit
def router_backward_kernel(
    dweights, dbeside, logits, indices, weight, dlogits, dx, tokens, hidden, factor,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, BESIDE: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = t < tokens
    e = tl.arange(0, E)
    ids = e[None, :] + tl.zeros((TOKENS, E), dtype=tl.int32)
    scores = _scores(tl.load(logits + t[:, None] * E + e[None, :], mask=inside[:, None], other=0.0), SIGMOID)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    inner = tl.zeros((TOKENS,), dtype=tl.float32)
    dscores = tl.zeros((TOKENS, E), dtype=tl.float32)
    hits = tl.zeros((TOKENS, E), dtype=tl.float32)
    for k in tl.static_range(K):
        is_chosen = ids == tl.load(indices + t * K + k, mask=inside, other=0).to(tl.int32)[:, None]
        grad = tl.load(dweights + t * K + k, mask=inside, other=0.0) * factor
        score = tl.sum(tl.where(is_chosen, scores, 0.0), axis=1)
        total += score
        inner += grad * score
        dscores += tl.where(is_chosen, grad[:, None], 0.0)
        hits += tl.where(is_chosen, 1.0, 0.0)
    if NORM:
        total += 1e-20
        dscores = dscores / total[:, None] - hits * (inner / (total * total))[:, None]
    if SIGMOID:
        result = dscores * scores * (1 - scores)
    else:
        result = scores * (dscores - tl.sum(dscores * scores, axis=1)[:, None])
    tl.store(dlogits + t[:, None] * E + e[None, :], result, mask=inside[:, None])
    for start in range(0, hidden, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        here = inside[:, None] & (cols < hidden)[None, :]
        rows = t.to(tl.int64)[:, None] * hidden + cols[None, :]
        w = tl.load(weight + e[:, None] * hidden + cols[None, :], mask=(cols < hidden)[None, :] & (e >= 0)[:, None], other=0.0)
        value = tl.sum(result[:, :, None] * w.to(tl.float32)[None, :, :], axis=1)
        if BESIDE:
            value += tl.load(dbeside + rows, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + rows, value.to(dx.dtype.element_ty), mask=here)


@triton.jit
def router_weight_kernel(dlogits, x, parts, tokens, hidden, E: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    e = tl.arange(0, E)
    total = tl.zeros((E, COLUMNS), dtype=tl.float32)
    for start in range(tl.program_id(1) * TOKENS, tokens, tl.num_programs(1) * TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = (t < tokens)[:, None]
        rows = t.to(tl.int64)[:, None] * hidden + cols[None, :]
        tile = tl.load(x + rows, mask=inside & (cols < hidden)[None, :], other=0.0).to(tl.float32)
        grad = tl.load(dlogits + t[:, None] * E + e[None, :], mask=inside & (e >= 0)[None, :], other=0.0)
        total += tl.sum(grad[:, :, None] * tile[:, None, :], axis=0)
    at = (tl.program_id(1) * E + e)[:, None] * hidden + cols[None, :]
    tl.store(parts + at, total, mask=(cols < hidden)[None, :] & (e >= 0)[:, None])


def route(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, replay_TK: Tensor | None, top_k: int, n_group: int, topk_group: int,
    sigmoid: bool, normalise: bool, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`(weights_TK, indices_TK, counts_E, logits_TE)`."""
    (tokens, hidden), experts, programs = x_TH.shape, weight_EH.shape[0], triton.cdiv(x_TH.shape[0], TOKENS)
    logits, weights = x_TH.new_empty((tokens, experts), dtype=torch.float32), x_TH.new_empty((tokens, top_k), dtype=torch.float32)
    indices, counts = x_TH.new_empty((tokens, top_k), dtype=torch.int64), x_TH.new_zeros(experts, dtype=torch.int64)
    router_kernel[(programs,)](
        x_TH, weight_EH, bias_E, replay_TK, logits, weights, indices, counts, tokens, hidden, factor,
        E=experts, K=top_k, G=n_group, TOPK_G=topk_group, SIGMOID=sigmoid, NORM=normalise, REPLAY=replay_TK is not None,
        PLACES=triton.next_power_of_2(top_k), **_tile(experts),
    )  # fmt: skip
    return weights, indices, counts, logits


def add_lift_(
    histogram_EN: Tensor, logits_TE: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int, sigmoid: bool
) -> None:
    """Counts each token's `quantile.bias_lift` into its expert's row."""
    tokens, experts = logits_TE.shape
    lift_kernel[(triton.cdiv(tokens, TOKENS),)](
        logits_TE, bias_E, histogram_EN, tokens, E=experts, K=top_k, G=n_group, TOPK_G=topk_group, SIGMOID=sigmoid,
        BINS=histogram_EN.shape[1], TOKENS=TOKENS,
    )  # fmt: skip


def route_backward(
    dweights_TK: Tensor, dbeside_TH: Tensor | None, x_TH: Tensor, weight_EH: Tensor, logits_TE: Tensor, indices_TK: Tensor,
    sigmoid: bool, normalise: bool, factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`(dx, dweight)`; what came to x from elsewhere is added in the same pass."""
    (tokens, hidden), experts = x_TH.shape, weight_EH.shape[0]
    dlogits, dx, tile = torch.empty_like(logits_TE), torch.empty_like(x_TH), _tile(experts)
    router_backward_kernel[(triton.cdiv(tokens, TOKENS),)](
        dweights_TK, dbeside_TH, logits_TE, indices_TK, weight_EH, dlogits, dx, tokens, hidden, factor,
        E=experts, K=indices_TK.shape[1], SIGMOID=sigmoid, NORM=normalise, BESIDE=dbeside_TH is not None,
        **tile,
    )  # fmt: skip
    parts = torch.empty((SHARES, experts, hidden), dtype=torch.float32, device=x_TH.device)
    grid = (triton.cdiv(hidden, tile["COLUMNS"]), SHARES)
    router_weight_kernel[grid](dlogits, x_TH, parts, tokens, hidden, E=experts, **tile)
    dweight = torch.empty_like(weight_EH)
    column_sums[(triton.cdiv(experts * hidden, 32),)](parts, dweight, SHARES, experts * hidden, BLOCK_R=64, BLOCK=32)
    return dx, dweight


def _tile(experts: int) -> dict[str, int]:
    """Of x at once: a tile of tokens, experts and columns stays in registers. With four warps 128 experts took all 255 of a
    thread, and ptxas half a minute."""
    width = max(16, min(COLUMNS, 8 * COLUMNS // experts))
    return {"TOKENS": TOKENS, "COLUMNS": width, "num_warps": 4 if experts <= 32 else 8}
