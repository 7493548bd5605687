"""Mixture of experts: route, dispatch, experts, combine, shared expert.

Shapes: B batch, S sequence, T = B * S tokens, H hidden, I expert width, E experts, K experts per token,
R = T * K routed rows, A and B any widths.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEGPTConfig
from .layers import ResidualLinear
from .router import Gate, Router, RoutingTape, route, router_logits

__all__ = ["Experts", "Gate", "MoE", "Router", "RoutingTape", "SharedExpert", "route", "router_logits"]


class Experts(nn.Module):
    """All routed experts of a layer: `W2(dropout(silu(W1 x) * W3 x))`."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))  # [E, 2I, H], W1 above W3
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))  # [E, H, I], W2
        self.dropout = config.expert_dropout

    def forward(self, x_RH: Tensor, counts_E: Tensor) -> Tensor:
        """`[R, H]`: rows in expert order, `counts_E` for each expert; one without rows gets a gradient of 0."""
        gate_RI, up_RI = grouped_linear(x_RH, self.gate_up_proj, counts_E).chunk(2, dim=-1)
        hidden_RI = F.dropout(F.silu(gate_RI) * up_RI, self.dropout, self.training)
        return grouped_linear(hidden_RI, self.down_proj, counts_E)


def grouped_linear(x_RA: Tensor, weight_EBA: Tensor, counts_E: Tensor) -> Tensor:
    """`[R, B]`: each expert's weight on its own run of rows, without asking the device how long the runs are.

    The loop serves what `grouped_mm` does not take: float64 and rows not aligned to 16 bytes. The two are bit-equal on
    a CPU; the loop's backward stacks the experts' gradients once more (800m's layer in bf16: 37 ms against 27).
    """
    aligned = all(size * x_RA.element_size() % 16 == 0 for size in weight_EBA.shape[1:])
    if aligned and x_RA.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return F.grouped_mm(x_RA, weight_EBA.mT, offs=counts_E.cumsum(0, dtype=torch.int32))
    # unbind, not indexing: the backward of an index fills a zero tensor of all experts for each expert.
    return torch.cat([F.linear(*one) for one in zip(x_RA.split(counts_E.tolist()), weight_EBA.unbind(), strict=True)])


class SharedExpert(nn.Module):
    """The SwiGLU every token passes; `n_shared_experts` of them are one, that many times as wide."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        width = config.moe_intermediate_size * config.n_shared_experts
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = ResidualLinear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Routed experts plus shared expert. DeepSpeed's AutoEP swaps this module for its all-to-all one."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_TH = x_BSH.flatten(0, 1)
        weights_TK, indices_TK, counts_E = self.gate(x_TH)
        x_RH, order_R, place_R = dispatch(x_TH, indices_TK)
        routed_TH = combine(self.experts(x_RH, counts_E), order_R, place_R, weights_TK)
        return routed_TH.view_as(x_BSH) + self.shared_experts(x_BSH)


def dispatch(x_TH: Tensor, indices_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(rows [R, H] in expert order, order [R], place [R])`.

    Row r belongs to assignment `order[r]` = t * K + k, and assignment a lies at row `place[a]`.
    """
    order_R = indices_TK.flatten().argsort(stable=True)
    place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.numel(), device=order_R.device))
    return GatherRows.apply(x_TH, order_R, place_R, indices_TK.shape[1]), order_R, place_R


def combine(out_RH: Tensor, order_R: Tensor, place_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum `[T, H]` of each token's K expert outputs, in fp32 and rounded once."""
    out_TKH = GatherRows.apply(out_RH, place_R, order_R, 1).unflatten(0, weights_TK.shape)
    return (out_TKH * weights_TK.unsqueeze(-1)).sum(dim=1).to(out_RH.dtype)


class GatherRows(torch.autograd.Function):
    """`x[index // copies]` for a permutation `index` of the rows' copies; the gradient gathers by its inverse.

    Autograd's own backward of an index sums with a sort on CUDA and one row at a time on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index_R: Tensor, inverse_R: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.copies = copies
        return x.index_select(0, index_R // copies if copies > 1 else index_R)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (inverse_R,) = ctx.saved_tensors
        dx = dout.index_select(0, inverse_R)
        return dx.unflatten(0, (-1, ctx.copies)).sum(dim=1) if ctx.copies > 1 else dx, None, None, None
