"""The sink's rescaling and its gradient, each in one pass over the attention's output.

Shapes: B batch, S sequence, N query heads, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import POSITIONS
from .norm import summed


@triton.jit
def add_sink_kernel(out, lse, sinks, out_with, lse_with, length, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = s < length
    at = (batch * heads + head) * length + s
    before = tl.load(lse + at, mask=inside, other=0.0)
    sink = tl.load(sinks + head).to(tl.float32)
    high = tl.maximum(before, sink)
    after = high + tl.log(tl.exp(before - high) + tl.exp(sink - high))
    tl.store(lse_with + at, after, mask=inside)
    where = ((batch * length + s) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    value = tl.load(out + where, mask=inside[:, None], other=0.0).to(tl.float32) * tl.exp(before - after)[:, None]
    tl.store(out_with + where, value.to(out_with.dtype.element_ty), mask=inside[:, None])


@triton.jit
def sink_gradient_kernel(dout, out_with, lse_with, sinks, parts, length, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = s < length
    where = ((batch * length + s) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    grad = tl.load(dout + where, mask=inside[:, None], other=0.0).to(tl.float32)
    dots = tl.sum(grad * tl.load(out_with + where, mask=inside[:, None], other=0.0).to(tl.float32), axis=1)
    after = tl.load(lse_with + (batch * heads + head) * length + s, mask=inside, other=float("inf"))
    share = tl.exp(tl.load(sinks + head).to(tl.float32) - after)
    row = batch * tl.num_programs(0) + tl.program_id(0)
    tl.store(parts + row * heads + head, -tl.sum(share * dots, axis=0))


def add_sink(out_BSND: Tensor, lse_BNS: Tensor, sinks_N: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, dim = out_BSND.shape
    results = torch.empty_like(out_BSND), torch.empty_like(lse_BNS)
    grid = (triton.cdiv(length, POSITIONS), heads, batch)
    add_sink_kernel[grid](out_BSND, lse_BNS, sinks_N, *results, length, heads, D=dim, BLOCK=POSITIONS)
    return results


def sink_gradient(dout_BSND: Tensor, out_BSND: Tensor, lse_BNS: Tensor, sinks_N: Tensor) -> Tensor:
    batch, length, heads, dim = out_BSND.shape
    blocks = triton.cdiv(length, POSITIONS)
    parts = lse_BNS.new_empty((batch * blocks, heads))
    grid = (blocks, heads, batch)
    sink_gradient_kernel[grid](dout_BSND, out_BSND, lse_BNS, sinks_N, parts, length, heads, D=dim, BLOCK=POSITIONS)
    return summed(parts, sinks_N)
