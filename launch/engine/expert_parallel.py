"""Expert parallelism by DeepSpeed's AutoEP, with this project's router, experts and layer inside.

`deepspeed.initialize` swaps each MoE layer for AutoEP's, which sends tokens to the ranks that hold their experts. AutoEP's own
router multiplies in bf16, counts a token again in every recomputation and in evaluation, and may choose other experts when a
block is recomputed; its experts know no dropout. So while it builds its layers it finds these classes in their place.

Shapes: L experts of a rank, N rows that arrived at it, H hidden, I expert width; A and B stand for either, as the product has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import deepspeed
import deepspeed.module_inject.auto_ep_layer as auto_ep_layer
import torch
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import nn
from torch.nn import functional as F

from launch.engine.moe_layer import MoELayer
from model import MoEGPTConfig
from model.dispatch import grouped_linears, swiglu
from model.grouped import OURS, Products
from model.router import Router


def _router_class(config: MoEGPTConfig) -> type[nn.Module]:
    class AutoEPRouter(Router):
        """The model's own router (fp32, replayed in recomputation, counted once) under AutoEP's constructor and names."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(config)
            self.gate = TokenChoiceTopKRouter(**arguments).gate  # AutoEP copies the source's weight into it

        def projection(self) -> torch.Tensor:
            weight: torch.Tensor = self.gate.weight
            return weight

    return AutoEPRouter


class Experts(GroupedExperts):  # type: ignore[misc]
    """AutoEP's weights `w1, w3 [L, I, H]` and `w2 [L, H, I]` of this rank's experts, with the model's products and dropout."""

    dropout = 0.0

    def forward(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor, tally_N: torch.Tensor | None = None) -> torch.Tensor:
        """`[N, H]` of rows in expert order; `model.dispatch.tally` has their weights."""
        ends_L = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
        hidden_NI = swiglu(*self._products(x, ends_L, self.w1, self.w3), tally_R=tally_N)
        (out_NH,) = self._products(F.dropout(hidden_NI, self.dropout, self.training), ends_L, self.w2)
        return out_NH

    def _products(self, x_NA: torch.Tensor, ends_L: torch.Tensor, *weights_LBA: torch.Tensor) -> tuple[torch.Tensor, ...]:
        theirs = self.use_triton_grouped_mm and self.num_experts > 1 and not torch.are_deterministic_algorithms_enabled()
        by = triton_products() if theirs else OURS
        return grouped_linears(x_NA, ends_L, *weights_LBA, by=by)


@cache
def triton_products() -> Products:
    """DeepSpeed's Triton kernels, for several experts on a GPU before sm90 where ours are switched off; not under
    `--deterministic`, since they try out their tiles and a restart may choose others. Not by way of their
    `group_gemm_triton`, which keeps for its backward what it was given: of two weights the joined copy, by formula 4.8 GB for
    `4b` with all experts on a rank."""
    from deepspeed.ops.triton_ops.group_gemm_triton import _group_gemm, _grouped_dw

    return Products(_group_gemm, lambda dout_NB, x_NA, ends_L: _grouped_dw(dout_NB, x_NA, ends_L, ends_L.numel()))


@contextmanager
def model_parts(config: MoEGPTConfig) -> Iterator[None]:
    """While open, AutoEP builds layers of ours, with the model's router and experts."""
    parts: dict[str, Any] = {
        "TokenChoiceTopKRouter": _router_class(config),
        "GroupedExperts": type("Experts", (Experts,), {"dropout": config.expert_dropout}),
        "AutoEPMoELayer": MoELayer,
    }
    with patch.multiple(auto_ep_layer, **parts):
        yield


def moe_layers(module: nn.Module) -> list[MoELayer]:
    """The swapped MoE layers, first to last."""
    return [m for m in module.modules() if isinstance(m, MoELayer)]


def register_router_weights(module: nn.Module) -> None:
    """Tell ZeRO 3 that each router multiplies by its gate's weight itself, without calling the gate.

    DeepSpeed notices such a use by itself, but only where it finds the weight partitioned. After a checkpoint was loaded it is
    whole in the first step and partitioned in the second: the recorded order of parameters then lacks it, and the run ends
    with a "tracing error".
    """
    for layer in moe_layers(module):
        deepspeed.zero.register_external_parameter(layer.router, layer.router.projection())


def check_swapped(module: nn.Module, config: MoEGPTConfig) -> None:
    """Every MoE layer was swapped, routes by the model's router, has its shared experts, and its correction bias is an fp32 buffer.

    DeepSpeed 0.19.6 dropped the buffer without a word, and a parameter in its place would be cast to bf16, where a bias step of
    0.001 is lost.
    """
    layers = moe_layers(module)
    if len(layers) != config.num_hidden_layers:
        raise RuntimeError(f"AutoEP swapped {len(layers)} of {config.num_hidden_layers} MoE layers")
    for number, layer in enumerate(layers):
        if not isinstance(layer.router, Router):
            raise RuntimeError(f"layer {number}: AutoEP built its own router, {type(layer.router).__name__}")
        if layer.shared_experts is None:
            raise RuntimeError(f"layer {number}: AutoEP left out the shared experts")
        bias = dict(layer.router.named_buffers()).get("e_score_correction_bias")
        if bias is None or bias.dtype != torch.float32:
            kind = "missing" if bias is None else str(bias.dtype)
            raise RuntimeError(f"layer {number}: the correction bias must be an fp32 buffer, it is {kind}")
