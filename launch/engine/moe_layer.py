"""The mixture-of-experts layer that trains: AutoEP's groups, weights and checkpoints, with a forward of its own.

AutoEP's forward permutes the rows twice and back, reads them for gate and up apart, waits for the split sizes before it has
anything else to do, and makes its sum in several passes. Here a row moves once before its expert and once after it:

    route                         the model's router
    counts on their way           to the ranks that hold the experts
    rows in expert order          one gather
    shared expert, first half     behind it the host's wait for the counts is over
    rows on their way
    shared expert, second half    while they travel
    experts                       gate and up in one product; with one expert on a rank a plain matrix product
    rows back
    combine                       weights, shared expert and residual stream in one pass

Shapes: B batch, S sequence, T tokens, H hidden, E experts, L experts of a rank, P ranks of an expert group, K experts per
token, R = T * K routed rows, N rows that arrived.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.module_inject.auto_ep_comm import COMM_BACKEND
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor

from launch.engine.exchange import Arrival, Departure, Exchange
from model.dispatch import combine, expert_order, gather_beside, gather_rows, invert, tally


class MoELayer(AutoEPMoELayer):  # type: ignore[misc]
    """`deepspeed.initialize` puts it where the model's `MoE` was; see `expert_parallel.model_parts`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.comm_backend != COMM_BACKEND or self.score_apply != "post" or self.return_router_logits:
            raise ValueError(
                "expert_parallel: this model's layer exchanges by comm_backend 'comm' and weighs rows after the experts "
                f"(score_apply 'post'); got comm_backend {self.comm_backend!r} and score_apply {self.score_apply!r}"
            )

    def forward(self, x_BSH: Tensor, residual_BSH: Tensor | None = None) -> Tensor:
        """`residual + routed + shared`."""
        x_TH = x_BSH.flatten(0, 1)
        residual_TH = None if residual_BSH is None else residual_BSH.flatten(0, 1)
        weights_TK, indices_TK, counts_E, x_TH = self.router(x_TH)
        routed = self._local if self.ep_size == 1 else self._exchanged
        out_RH, sorted_R, inverse_R, shared_TH = routed(x_TH, weights_TK, indices_TK, counts_E)
        return combine(out_RH, sorted_R, inverse_R, weights_TK, shared_TH, residual_TH).view_as(x_BSH)

    def _local(self, x_TH: Tensor, weights_TK: Tensor, indices_TK: Tensor, counts_E: Tensor) -> tuple[Tensor, ...]:
        """All experts are here: `(out_RH, sorted_R, inverse_R, shared_TH)`."""
        sorted_R, inverse_R = expert_order(indices_TK)
        rows_RH, *beside_TH = gather_beside(x_TH, sorted_R, inverse_R, indices_TK.shape[1])
        out_RH = self.experts(rows_RH, counts_E, tally(weights_TK, inverse_R))  # by which the weights have their gradient
        return out_RH, sorted_R, inverse_R, self.shared_experts(*beside_TH)

    def _exchanged(self, x_TH: Tensor, weights_TK: Tensor, indices_TK: Tensor, counts_E: Tensor) -> tuple[Tensor, ...]:
        """The experts are spread over the ranks of `ep_group`; results as of `_local`."""
        exchange = Exchange(counts_E.view(self.ep_size, -1), self.ep_group)
        sorted_R, inverse_R = expert_order(indices_TK)
        rows_RH, *beside_TH = gather_beside(x_TH, sorted_R, inverse_R, indices_TK.shape[1])
        hidden_TI = self.shared_experts.hidden(*beside_TH)
        exchange.wait_for_counts()
        beside, tally_N = exchange.of_gradients(), tally(weights_TK, inverse_R)
        if tally_N is not None:
            tally_N = Departure.apply(tally_N, beside)  # type: ignore[no-untyped-call]
        arriving_NH = Departure.apply(rows_RH, exchange)  # type: ignore[no-untyped-call]
        shared_TH = self.shared_experts.down_proj(hidden_TI)
        rows_NH = Arrival.apply(arriving_NH, exchange)  # type: ignore[no-untyped-call]
        if tally_N is not None:
            tally_N = Arrival.apply(tally_N, beside)  # type: ignore[no-untyped-call]
        out_NH = self._local_experts(rows_NH, tally_N, exchange.received_PL)
        returning = exchange.reversed()
        out_RH = Arrival.apply(Departure.apply(out_NH, returning), returning)  # type: ignore[no-untyped-call]
        return out_RH, sorted_R, inverse_R, shared_TH

    def _local_experts(self, rows_NH: Tensor, tally_N: Tensor | None, received_PL: Tensor) -> Tensor:
        """Rows that lie by source rank and, within it, by expert; their results in the same order."""
        counts_L = received_PL.sum(dim=0)
        if self.num_local_experts == 1:
            alone_NH: Tensor = self.experts(rows_NH, counts_L, tally_N)
            return alone_NH
        expert_PL = torch.arange(self.num_local_experts, device=rows_NH.device).expand_as(received_PL)
        expert_N = expert_PL.flatten().repeat_interleave(received_PL.flatten(), output_size=rows_NH.shape[0])
        sorted_N = expert_N.argsort(stable=True)
        inverse_N = invert(sorted_N)
        if tally_N is not None:
            tally_N = tally_N.index_select(0, sorted_N)
        out_NH = self.experts(gather_rows(rows_NH, sorted_N, inverse_N, 1), counts_L, tally_N)
        return gather_rows(out_NH, inverse_N, sorted_N, 1)
