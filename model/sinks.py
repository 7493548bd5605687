"""Exact attention sinks on any flash kernel, forward and backward.

A sink is one learned logit per head in the softmax's denominator, with no value. From (o, lse) of a kernel that
knows nothing of it:

    lse' = logaddexp(lse, sink)        o' = o * exp(lse - lse')

is the output with the sink, and the same kernel's backward, given (o', lse') for (o, lse), returns the exact dq, dk
and dv: it rebuilds the probabilities as exp(qk - lse') and their mean gradient as rowsum(do * o'). The sink's
gradient is `-sum(exp(sink - lse') * rowsum(do * o'))`. Rescaling in autograd on top of a kernel that drops the
gradient of lse (flash-attn 2, torch 2.13's `varlen_attn`) gives the same output and dq wrong by 13 %, dk by 11 %.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .flash import FlashKernel, FlashOutput
from .mask import AttentionMask
from .operators import fills_tile, ops, usable

_watch: Callable[[Tensor], None] | None = None


@contextmanager
def watching_sink_mass(watch: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, every flash attention with sinks hands the sinks' share of its softmax to `watch`: `[T]`, each token's mean over
    the heads, sample after sample.

    In the order of the layers, and again where a block is recomputed: for passes without gradients.
    """
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before


def add_sink(out: Tensor, lse: Tensor, sinks_N: Tensor) -> tuple[Tensor, Tensor]:
    """`(o', lse')` of out `[..., S, N, D]` and lse `[..., N, S]`; out keeps its dtype."""
    if usable(out) and fills_tile(out.shape[-1]):
        whole, lse_with = ops.add_sink(_batched(out), lse.view(-1, *lse.shape[-2:]), sinks_N)
        return whole.view_as(out), lse_with.view_as(lse)
    lse_with = torch.logaddexp(lse, sinks_N.to(lse.dtype).unsqueeze(-1))
    keep = (lse - lse_with).exp().mT.unsqueeze(-1)
    return (out * keep).to(out.dtype), lse_with


def sink_gradient(dout: Tensor, out_with: Tensor, lse_with: Tensor, sinks_N: Tensor) -> Tensor:
    """dsink `[N]` in lse's dtype, from the gradient of o' and (o', lse')."""
    if usable(out_with) and fills_tile(out_with.shape[-1]):
        dsinks: Tensor = ops.sink_gradient(_batched(dout), _batched(out_with), lse_with.view(-1, *lse_with.shape[-2:]), sinks_N)
        return dsinks
    probability = (sinks_N.to(lse_with.dtype).unsqueeze(-1) - lse_with).exp().mT
    per_query = probability * (dout.to(lse_with.dtype) * out_with).sum(dim=-1)
    return -per_query.flatten(0, -2).sum(dim=0)


def _batched(x: Tensor) -> Tensor:
    """`[B, S, N, D]` of that or of `[S, N, D]`."""
    return x.view(-1, *x.shape[-3:])


def attend_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks_N: Tensor | None, kernel: FlashKernel, mask: AttentionMask, scale: float
) -> Tensor:
    """Attention by `kernel`, dense `[B, S, N, D]`, or packed `[T, N, D]` where the mask is varlen; without sinks where None."""
    out: Tensor = FlashWithSinks.apply(q, k, v, sinks_N, kernel, mask, scale)  # type: ignore[no-untyped-call]
    return out


class FlashWithSinks(torch.autograd.Function):
    """The kernel's forward and backward, the sinks' rule applied in between."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_N: Tensor | None,
        kernel: FlashKernel,
        mask: AttentionMask,
        scale: float,
    ) -> Tensor:
        out, lse, state = kernel.forward(q, k, v, mask, scale)
        if sinks_N is not None:
            out, lse = add_sink(out, lse, sinks_N)
            if _watch is not None:
                _watch((sinks_N.to(lse.dtype).unsqueeze(-1) - lse).exp().mean(dim=-2).flatten())
        ctx.save_for_backward(q, k, v, sinks_N, out, lse, *state)
        ctx.kernel, ctx.mask, ctx.scale = kernel, mask, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_N, out, lse, *state = ctx.saved_tensors
        dq, dk, dv = ctx.kernel.backward(dout, q, k, v, FlashOutput(out, lse, tuple(state)), ctx.mask, ctx.scale)
        dsinks = None
        if sinks_N is not None and ctx.needs_input_grad[3]:
            dsinks = sink_gradient(dout, out, lse, sinks_N).to(sinks_N.dtype)
        return dq, dk, dv, dsinks, None, None, None
