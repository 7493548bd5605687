"""RMSNorm of rows, with the residual sum before it; q and k norm with RoPE. Statistics in fp32, one rounding.

Nothing is kept for the backward but the input: it reads each row anyway, and the row's norm follows from it.

Shapes: T tokens, H hidden, N query heads, M key-value heads, D head dim, P programs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import PROGRAMS


@triton.jit
def column_sums(parts, out, rows, width, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """`out[h] = sum of parts[:, h]`."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, rows, BLOCK_R):
        lines = start + tl.arange(0, BLOCK_R)
        inside = (lines < rows)[:, None] & (cols < width)[None, :]
        total += tl.sum(tl.load(parts + lines[:, None] * width + cols[None, :], mask=inside, other=0.0), axis=0)
    tl.store(out + cols, total.to(out.dtype.element_ty), mask=cols < width)


def summed(parts_PA: Tensor, like: Tensor) -> Tensor:
    """The sum over programs, in the shape and dtype of `like`."""
    out, width = torch.empty_like(like, memory_format=torch.contiguous_format), parts_PA[0].numel()
    column_sums[(triton.cdiv(width, 32),)](parts_PA, out, parts_PA.shape[0], width, BLOCK_R=64, BLOCK=32)
    return out


@triton.jit
def norm_forward_kernel(x, added, weight, stream, out, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    value = tl.load(x + row * width + cols, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(added + row * width + cols, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(stream.dtype.element_ty)
        tl.store(stream + row * width + cols, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + cols, (value * scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(dout, dstream, x, weight, dx, dweight, rows, width, eps, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    long = (tl.program_id(0) * 0).to(tl.int64)  # an offset in a long batch needs 64 bits, and the interpreter's loop has plain ints
    for line in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = (long + line) * width + cols
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        value *= scale
        total += grad * value
        grad *= w
        result = (grad - value * (tl.sum(grad * value, axis=0) / width)) * scale
        if STREAM:
            result += tl.load(dstream + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0) * width + cols, total, mask=inside)


def norm_forward(x_TH: Tensor, added_TH: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(stream, normed)`; the stream is `x + added`, and empty where nothing is added."""
    rows, width = x_TH.shape
    out = torch.empty_like(x_TH)
    stream = torch.empty_like(x_TH) if added_TH is not None else x_TH.new_empty(0)
    block = triton.next_power_of_2(width)
    norm_forward_kernel[(rows,)](
        x_TH, added_TH, weight_H, stream, out, width, eps, ADD=added_TH is not None, BLOCK=block, num_warps=warps(block)
    )
    return stream, out


def norm_backward(dout_TH: Tensor, dstream_TH: Tensor | None, x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(dx, dweight)`; the stream's gradient is added to dx in the same pass."""
    rows, width = x_TH.shape
    dx = torch.empty_like(x_TH)
    parts = x_TH.new_empty((min(PROGRAMS, rows), width), dtype=torch.float32)
    block = triton.next_power_of_2(width)
    norm_backward_kernel[(parts.shape[0],)](
        dout_TH, dstream_TH, x_TH, weight_H, dx, parts, rows, width, eps, STREAM=dstream_TH is not None, BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip
    return dx, summed(parts, weight_H)


def warps(block: int) -> int:
    """Eight elements a thread: 16 bytes of bf16."""
    return max(1, min(16, block // 256))


@triton.jit
def _halves_at(t, heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    head, col = tl.arange(0, HEADS), tl.arange(0, HALF)
    at = t * heads * 2 * HALF + head[:, None] * 2 * HALF + col[None, :]
    return at, (head < heads)[:, None] & (col >= 0)[None, :]


@triton.jit
def _turn(x, weight, out, t, heads, c1, c2, s1, s2, eps, NORM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr):
    at, inside = _halves_at(t, heads, HALF, HEADS)
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        col = tl.arange(0, HALF)
        a = a * scale * tl.load(weight + col).to(tl.float32)[None, :]
        b = b * scale * tl.load(weight + HALF + col).to(tl.float32)[None, :]
    tl.store(out + at, (a * c1 + b * s1).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, (b * c2 + a * s2).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_back(
    dout, x, weight, dx, total_a, total_b, t, heads, c1, c2, s1, s2, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    at, inside = _halves_at(t, heads, HALF, HEADS)
    da = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    db = tl.load(dout + at + HALF, mask=inside, other=0.0).to(tl.float32)
    ga, gb = da * c1 + db * s2, db * c2 + da * s1
    if NORM:
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        a, b = a * scale, b * scale
        total_a += tl.sum(ga * a, axis=0)
        total_b += tl.sum(gb * b, axis=0)
        col = tl.arange(0, HALF)
        ga *= tl.load(weight + col).to(tl.float32)[None, :]
        gb *= tl.load(weight + HALF + col).to(tl.float32)[None, :]
        mean = ((tl.sum(ga * a, axis=1) + tl.sum(gb * b, axis=1)) / (2 * HALF))[:, None]
        ga, gb = (ga - a * mean) * scale, (gb - b * mean) * scale
    tl.store(dx + at, ga.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + at + HALF, gb.to(dx.dtype.element_ty), mask=inside)
    return total_a, total_b


@triton.jit
def norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, n, m, positions, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    at = (t % positions) * 2 * HALF + tl.arange(0, HALF)
    c1, c2 = tl.load(cos + at)[None, :], tl.load(cos + at + HALF)[None, :]
    s1, s2 = tl.load(sin + at)[None, :], tl.load(sin + at + HALF)[None, :]
    _turn(q, q_weight, q_out, t, n, c1, c2, s1, s2, eps, NORM, HALF, N)
    _turn(k, k_weight, k_out, t, m, c1, c2, s1, s2, eps, NORM, HALF, M)


@triton.jit
def norm_rope_backward_kernel(
    dq, dk, q, k, q_weight, k_weight, cos, sin, dq_in, dk_in, parts, tokens, n, m, positions, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    qa = tl.zeros((HALF,), dtype=tl.float32)
    qb = tl.zeros((HALF,), dtype=tl.float32)
    ka = tl.zeros((HALF,), dtype=tl.float32)
    kb = tl.zeros((HALF,), dtype=tl.float32)
    col = tl.arange(0, HALF)
    long = (tl.program_id(0) * 0).to(tl.int64)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        t = long + token
        at = (t % positions) * 2 * HALF + col
        c1, c2 = tl.load(cos + at)[None, :], tl.load(cos + at + HALF)[None, :]
        s1, s2 = tl.load(sin + at)[None, :], tl.load(sin + at + HALF)[None, :]
        qa, qb = _turn_back(dq, q, q_weight, dq_in, qa, qb, t, n, c1, c2, s1, s2, eps, NORM, HALF, N)
        ka, kb = _turn_back(dk, k, k_weight, dk_in, ka, kb, t, m, c1, c2, s1, s2, eps, NORM, HALF, M)
    if NORM:
        row = parts + tl.program_id(0) * 4 * HALF
        tl.store(row + col, qa)
        tl.store(row + HALF + col, qb)
        tl.store(row + 2 * HALF + col, ka)
        tl.store(row + 3 * HALF + col, kb)


def _constants(q: Tensor, k: Tensor, weighted: bool) -> dict[str, int]:
    heads = {"N": triton.next_power_of_2(q.shape[1]), "M": triton.next_power_of_2(k.shape[1])}
    return {"NORM": weighted, "HALF": q.shape[2] // 2, **heads, "num_warps": warps(heads["N"] * q.shape[2] // 2)}


def norm_rope(
    q_TND: Tensor, k_TMD: Tensor, weights_D: Sequence[Tensor], cos_PD: Tensor, sin_PD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """q and k, normed by head where there are weights, then rotated; token t is at row t mod P of the tables."""
    out = torch.empty_like(q_TND), torch.empty_like(k_TMD)
    norm_rope_kernel[(q_TND.shape[0],)](
        q_TND, k_TMD, *(weights_D or (None, None)), cos_PD, sin_PD, *out, q_TND.shape[1], k_TMD.shape[1], cos_PD.shape[0], eps,
        **_constants(q_TND, k_TMD, bool(weights_D)),
    )  # fmt: skip
    return out


def norm_rope_backward(
    dq_TND: Tensor,
    dk_TMD: Tensor,
    q_TND: Tensor,
    k_TMD: Tensor,
    weights_D: Sequence[Tensor],
    cos_PD: Tensor,
    sin_PD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dweights [2, D] in fp32)`; without weights the last is empty."""
    tokens, programs = q_TND.shape[0], min(PROGRAMS, q_TND.shape[0])
    grads = torch.empty_like(dq_TND), torch.empty_like(dk_TMD)
    weighted = bool(weights_D)
    parts = q_TND.new_empty((programs, 2, q_TND.shape[2]) if weighted else (0,), dtype=torch.float32)
    norm_rope_backward_kernel[(programs,)](
        dq_TND, dk_TMD, q_TND, k_TMD, *(weights_D or (None, None)), cos_PD, sin_PD, *grads, parts, tokens,
        q_TND.shape[1], k_TMD.shape[1], cos_PD.shape[0], eps, **_constants(q_TND, k_TMD, weighted),
    )  # fmt: skip
    return *grads, summed(parts, parts[0]) if weighted else parts
