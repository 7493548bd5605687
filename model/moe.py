"""Mixture of experts: route, dispatch, experts, combine, shared expert.

Shapes: B batch, S sequence, T = B * S tokens, H hidden, I expert width, E experts, R = T * K routed rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEGPTConfig
from .decode import few_experts, takes_few
from .dispatch import combine, expert_order, gather_beside, grouped_linear, swiglu, tally
from .layers import ResidualLinear
from .router import Gate


class Experts(nn.Module):
    """All routed experts of a layer: `W2(dropout(silu(W1 x) * W3 x))`."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))  # [E, 2I, H], W1 above W3
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))  # [E, H, I], W2
        self.dropout = config.expert_dropout

    def forward(self, x_RH: Tensor, counts_E: Tensor, few_TK: Tensor | None = None, *, tally_R: Tensor | None = None) -> Tensor:
        """`[R, H]`: rows in expert order, `counts_E` for each expert; one without rows gets a gradient of 0. `dispatch.tally`
        has the rows' weights.

        With `few_TK`, the experts of a few tokens that are no rows yet: `[T, K, H]`, without gradients.
        """
        if few_TK is not None:
            return few_experts(x_RH, few_TK, self.gate_up_proj, self.down_proj)
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        hidden_RI = swiglu(grouped_linear(x_RH, ends_E, self.gate_up_proj), tally_R=tally_R)
        return grouped_linear(F.dropout(hidden_RI, self.dropout, self.training), ends_E, self.down_proj)


class SharedExpert(nn.Module):
    """The SwiGLU every token passes; `n_shared_experts` of them are one, that many times as wide."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        width = config.moe_intermediate_size * config.n_shared_experts
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = ResidualLinear(width, config.hidden_size)

    def hidden(self, x: Tensor, again: Tensor | None = None) -> Tensor:
        """Its first half: something to compute while a count is on its way. `again` is x with a gradient of its own."""
        return swiglu(self.gate_proj(x), self.up_proj(x if again is None else again))

    def forward(self, x: Tensor, again: Tensor | None = None) -> Tensor:
        out: Tensor = self.down_proj(self.hidden(x, again))
        return out


class MoE(nn.Module):
    """Routed experts plus shared expert. DeepSpeed's AutoEP swaps this module for the one that trains,
    `launch/engine/moe_layer.py`, which takes the same steps with an all-to-all between them."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x_BSH: Tensor, residual_BSH: Tensor | None = None) -> Tensor:
        """`residual + routed + shared`; the residual stream comes in here, so that one pass makes the sum."""
        x_TH = x_BSH.flatten(0, 1)
        residual_TH = None if residual_BSH is None else residual_BSH.flatten(0, 1)
        weights_TK, indices_TK, counts_E, x_TH = self.gate(x_TH)
        if not self.training and takes_few(x_TH, indices_TK, self.gate.num_experts):
            few_TKH = self.experts(x_TH, counts_E, indices_TK)
            sum_TH: Tensor = (few_TKH * weights_TK.unsqueeze(-1)).sum(dim=1) + self.shared_experts(x_TH)
            sum_TH = sum_TH if residual_TH is None else sum_TH + residual_TH
            return sum_TH.to(x_BSH.dtype).view_as(x_BSH)
        sorted_R, inverse_R = expert_order(indices_TK)
        x_RH, *beside_TH = gather_beside(x_TH, sorted_R, inverse_R, indices_TK.shape[1])
        out_RH = self.experts(x_RH, counts_E, tally_R=tally(weights_TK, inverse_R))  # by which the weights have their gradient
        shared_TH = self.shared_experts(*beside_TH)
        return combine(out_RH, sorted_R, inverse_R, weights_TK, shared_TH, residual_TH).view_as(x_BSH)
