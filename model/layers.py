"""Small layers that several parts share."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .operators import ops, usable
from .rebuild import is_rebuilding, rebuildable, rebuilt


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor moved without the host waiting for the device: to a GPU by way of pinned memory."""
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class ResidualLinear(nn.Linear):
    """A projection without bias that writes into the residual stream; it starts smaller (`_init_weights`)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """What each of the layers makes of x. On a GPU each product of the backward adds to x's gradient as it writes it."""
    if usable(x) and all(_is_plain(layer, x) for layer in layers):
        projected: tuple[Tensor, ...] = Project.apply(x, *(layer.weight for layer in layers))  # type: ignore[no-untyped-call]
        return projected
    return tuple(layer(x) for layer in layers)


def _is_plain(layer: nn.Linear, x: Tensor) -> bool:
    """Whether calling it does no more than the product: no adapter, no hook, no autocast, no weight that ZeRO 3 or accelerate has
    elsewhere."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    plain = type(layer) is nn.Linear and layer.bias is None and not any(hooks) and not hasattr(layer.weight, "ds_id")
    there = layer.weight.dtype == x.dtype and layer.weight.device == x.device and not hasattr(layer, "_hf_hook")
    return plain and there and not torch.is_autocast_enabled("cuda")


class Project(torch.autograd.Function):
    """`x @ weight^T` of several weights `[B, A]`, x `[..., A]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows = [dout.flatten(0, -2) for dout in douts]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = rows[0] @ weights[0]
            for dout, weight in zip(rows[1:], weights[1:], strict=True):
                dx = dx.addmm_(dout, weight)
            dx = dx.view_as(x)
        wanted = zip(rows, ctx.needs_input_grad[1:], strict=True)
        return dx, *(dout.mT @ x.flatten(0, -2) if wants else None for dout, wants in wanted)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Statistics and product are fp32 and rounded once to x's dtype (Glm4Moe rounds before it multiplies with the
    weight as well; in fp32 the two are the same).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if usable(x):
            return _fused_norm(x, None, self.weight, self.eps)[1]
        return _plain_norm(x, self.weight, self.eps)


class ResidualNorm(RMSNorm):
    """`(x + added, its RMSNorm)`: the residual stream goes through, so that one pass does both, and one both gradients."""

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if usable(x):
            return _fused_norm(x, added, self.weight, self.eps)
        stream = x if added is None else x + added
        return stream, _plain_norm(stream, self.weight, self.eps)


def _plain_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    if not is_rebuilding():
        return F.rms_norm(x, weight_H.shape, weight_H, eps)
    if x.dtype in (torch.float32, torch.float64):  # which PyTorch reads twice as it is, and adds two gradients to the stream's
        return rebuilt(partial(_norm_of_two, eps=eps), x, x, weight_H)
    return rebuilt(partial(_norm_of_one, eps=eps), x, weight_H)


def _norm_of_one(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight_H.shape, weight_H, eps)


def _norm_of_two(x: Tensor, same: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(same.pow(2).mean(dim=-1, keepdim=True) + eps) * weight_H


def _fused_norm(x: Tensor, added: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    stream, out = FusedNorm.apply(x, added, weight_H, eps)  # type: ignore[no-untyped-call]
    return stream, rebuildable(out, partial(_normed, eps=eps), stream, weight_H)


def _normed(stream: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    out: Tensor = ops.norm(stream.flatten(0, -2), None, weight_H, eps)[1]
    return out


class FusedNorm(torch.autograd.Function):
    """Keeps the stream alone; its backward adds the stream's gradient to the norm's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows = None if added is None else added.flatten(0, -2)
        stream, out = ops.norm(x.flatten(0, -2), rows, weight_H, eps)
        stream = x.view_as(x) if added is None else stream.view_as(x)
        ctx.save_for_backward(stream, weight_H)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return stream, out.view_as(x)

    @staticmethod
    def backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return dstream, dstream if ctx.needs_input_grad[1] else None, None, None
        stream, weight_H = ctx.saved_tensors
        beside = None if dstream is None else dstream.flatten(0, -2)
        dx, dweight = ops.norm_backward(dout.flatten(0, -2), beside, stream.flatten(0, -2), weight_H, ctx.eps)
        dx = dx.view_as(stream)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None
