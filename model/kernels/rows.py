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
def spread_kernel(x, places, weights, out, width, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    value = tl.load(x + t * width + cols, mask=inside)
    for k in tl.static_range(K):
        row = value
        if WEIGHTED:
            row = (value.to(tl.float32) * tl.load(weights + t * K + k)).to(out.dtype.element_ty)
        tl.store(out + tl.load(places + t * K + k) * width + cols, row, mask=inside)


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
def weight_gradient_kernel(products, places, weights, out, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    product = tl.load(products + tl.load(places + index, mask=inside, other=0), mask=inside, other=0.0)
    weight = tl.load(weights + index, mask=inside, other=1.0)
    tl.store(out + index, tl.where(weight > 0, product / weight, 0.0), mask=inside)


@triton.jit
def swiglu_kernel(gate, up, out, count, width, stride, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = index // width * stride + index % width
    g = tl.load(gate + at, mask=index < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=index < count, other=0.0).to(tl.float32)
    tl.store(out + index, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=index < count)


@triton.jit
def swiglu_backward_kernel(
    dout, gate, up, dgate, dup, products, width, stride, PRODUCTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside, at = cols < width, row * stride + cols
        g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dout + row * width + cols, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        du = grad * g * sigmoid
        tl.store(dup + at, du.to(dup.dtype.element_ty), mask=inside)
        tl.store(dgate + at, (grad * u * sigmoid * (1 + g * (1 - sigmoid))).to(dgate.dtype.element_ty), mask=inside)
        if PRODUCTS:
            total += u * du
    if PRODUCTS:
        tl.store(products + row, tl.sum(total, axis=0))


def _row(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[1])
    return {"BLOCK": block, "num_warps": warps(block)}


def spread(x_TH: Tensor, places_R: Tensor, copies: int, weights_TK: Tensor | None) -> Tensor:
    """`[R, H]`: copy k of token t at row `places[t * K + k]`, times its weight if there are any."""
    out = x_TH.new_empty((places_R.numel(), x_TH.shape[1]))
    given = {"K": copies, "WEIGHTED": weights_TK is not None}
    spread_kernel[(x_TH.shape[0],)](x_TH, places_R, weights_TK, out, x_TH.shape[1], **given, **_row(x_TH))
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


BLOCK = 1024


def weight_gradient(products_R: Tensor, places_R: Tensor, weights_TK: Tensor) -> Tensor:
    """`[T, K]`: of each row what it has in `products`, over its weight; 0 where that is 0."""
    out = torch.empty_like(weights_TK)
    if count := out.numel():
        weight_gradient_kernel[(triton.cdiv(count, BLOCK),)](products_R, places_R, weights_TK, out, count, BLOCK=BLOCK)
    return out


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


def swiglu_backward(dout: Tensor, gate_up: Sequence[Tensor], with_products: bool) -> list[Tensor]:
    """Gradients of what was given, packed where that was; then `<out, dout>` of each row, fp32, or nothing."""
    gate, up = halves(gate_up)
    grads = [torch.empty_like(x) for x in gate_up]
    dgate, dup = halves(grads)
    products = dout.new_empty(dout.shape[:-1] if with_products else 0, dtype=torch.float32)
    if dout.numel():
        width, stride = gate.shape[-1], gate_up[0].shape[-1]
        block = min(BLOCK, triton.next_power_of_2(width))
        more = {"PRODUCTS": with_products, "BLOCK": block, "num_warps": warps(block)}
        swiglu_backward_kernel[(dout.numel() // width,)](dout, gate, up, dgate, dup, products, width, stride, **more)
    return [*grads, products]
