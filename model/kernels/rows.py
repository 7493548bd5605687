"""Rows into expert order, through SwiGLU, and back to their tokens: each in one pass, sums in fp32, rounded once.

Shapes: T tokens, H hidden, I expert width, K experts per token, R = T * K routed rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm import warps


@triton.jit
def spread_kernel(x, places, out, width, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    value = tl.load(x + t * width + cols, mask=inside)
    for k in tl.static_range(K):
        tl.store(out + tl.load(places + t * K + k) * width + cols, value, mask=inside)


@triton.jit
def collect_kernel(rows, places, a, b, out, width, K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        total += tl.load(rows + tl.load(places + t * K + k) * width + cols, mask=inside, other=0.0).to(tl.float32)
    if A:
        total += tl.load(a + t * width + cols, mask=inside, other=0.0).to(tl.float32)
    if B:
        total += tl.load(b + t * width + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * width + cols, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    rows, places, weights, shared, residual, out, width, K: tl.constexpr, SHARED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows + tl.load(places + t * K + k) * width + cols, mask=inside, other=0.0).to(tl.float32)
        total += row * tl.load(weights + t * K + k)
    if SHARED:
        total += tl.load(shared + t * width + cols, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + t * width + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * width + cols, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_backward_kernel(dout, rows, places, weights, drows, dweights, width, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    grad = tl.load(dout + t * width + cols, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        at = tl.load(places + t * K + k) * width + cols
        row = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dweights + t * K + k, tl.sum(row * grad, axis=0))
        tl.store(drows + at, (grad * tl.load(weights + t * K + k)).to(drows.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate, up, out, count, width, stride, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = index // width * stride + index % width
    g = tl.load(gate + at, mask=index < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=index < count, other=0.0).to(tl.float32)
    tl.store(out + index, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=index < count)


@triton.jit
def swiglu_backward_kernel(dout, gate, up, dgate, dup, count, width, stride, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = index // width * stride + index % width
    inside = index < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dout + index, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    tl.store(dup + at, (grad * g * sigmoid).to(dup.dtype.element_ty), mask=inside)
    tl.store(dgate + at, (grad * u * sigmoid * (1 + g * (1 - sigmoid))).to(dgate.dtype.element_ty), mask=inside)


def _row(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[1])
    return {"BLOCK": block, "num_warps": warps(block)}


def spread(x_TH: Tensor, places_R: Tensor, copies: int) -> Tensor:
    """`[R, H]`: copy k of token t at row `places[t * K + k]`."""
    out = x_TH.new_empty((places_R.numel(), x_TH.shape[1]))
    spread_kernel[(x_TH.shape[0],)](x_TH, places_R, out, x_TH.shape[1], K=copies, **_row(x_TH))
    return out


def collect(rows_RH: Tensor, places_R: Tensor, copies: int, a_TH: Tensor | None, b_TH: Tensor | None) -> Tensor:
    """`[T, H]`: of each token the sum of its copies, and of what is given beside them."""
    tokens = places_R.numel() // copies
    out = rows_RH.new_empty((tokens, rows_RH.shape[1]))
    given = {"A": a_TH is not None, "B": b_TH is not None}
    collect_kernel[(tokens,)](rows_RH, places_R, a_TH, b_TH, out, rows_RH.shape[1], K=copies, **given, **_row(rows_RH))
    return out


def combine(rows_RH: Tensor, places_R: Tensor, weights_TK: Tensor, shared_TH: Tensor | None, residual_TH: Tensor | None) -> Tensor:
    tokens, copies = weights_TK.shape
    out = rows_RH.new_empty((tokens, rows_RH.shape[1]))
    given = {"SHARED": shared_TH is not None, "RESIDUAL": residual_TH is not None}
    combine_kernel[(tokens,)](
        rows_RH, places_R, weights_TK, shared_TH, residual_TH, out, rows_RH.shape[1], K=copies, **given, **_row(rows_RH)
    )
    return out


def combine_backward(dout_TH: Tensor, rows_RH: Tensor, places_R: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """`(drows, dweights)`."""
    tokens, copies = weights_TK.shape
    drows, dweights = torch.empty_like(rows_RH), torch.empty_like(weights_TK)
    combine_backward_kernel[(tokens,)](
        dout_TH, rows_RH, places_R, weights_TK, drows, dweights, rows_RH.shape[1], K=copies, **_row(rows_RH)
    )
    return drows, dweights


BLOCK = 1024


def halves(gate_up: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=-1)
    return gate, up


def swiglu(gate_up: Sequence[Tensor]) -> Tensor:
    gate, up = halves(gate_up)
    out = gate.new_empty(gate.shape)
    width, stride = gate.shape[-1], gate_up[0].shape[-1]
    if out.numel():
        swiglu_kernel[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), width, stride, BLOCK=BLOCK)
    return out


def swiglu_backward(dout: Tensor, gate_up: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of what was given, packed where that was."""
    gate, up = halves(gate_up)
    grads = [torch.empty_like(x) for x in gate_up]
    dgate, dup = halves(grads)
    width, stride = gate.shape[-1], gate_up[0].shape[-1]
    if dout.numel():
        grid = (triton.cdiv(dout.numel(), BLOCK),)
        swiglu_backward_kernel[grid](dout, gate, up, dgate, dup, dout.numel(), width, stride, BLOCK=BLOCK)
    return grads
