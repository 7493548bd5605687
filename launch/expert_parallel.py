"""Expert parallelism by DeepSpeed's AutoEP, with this project's router and experts inside.

`deepspeed.initialize` swaps each MoE layer for AutoEP's, which sends tokens to the ranks that hold their experts. AutoEP's own
router multiplies in bf16, counts a token again in every recomputation and in evaluation, and may choose other experts when a
block is recomputed; its experts know no dropout. So while it builds its layers it finds these two classes in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed.module_inject.auto_ep_layer as auto_ep_layer
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS, GroupedExperts, register_expert_activation
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import nn
from torch.nn import functional as F

from model import MoEGPTConfig
from model.moe import Router

DROPOUT_ACTIVATION = "swiglu_dropout"


def _swiglu_dropout(gate: torch.Tensor, up: torch.Tensor, rate: float, limit: float) -> torch.Tensor:
    """dropout(silu(gate) * up), DESIGN.md's expert; AutoEP hands a layer's `activation_alpha` through as `rate`."""
    return F.dropout(F.silu(gate) * up, rate)


if DROPOUT_ACTIVATION not in EXPERT_ACTIVATIONS:
    register_expert_activation(DROPOUT_ACTIVATION, _swiglu_dropout)


def _router_class(config: MoEGPTConfig) -> type[nn.Module]:
    class AutoEPRouter(Router):
        """The model's own router (fp32, replayed in recomputation, counted once) under AutoEP's constructor and names."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(config)
            self.gate = TokenChoiceTopKRouter(**arguments).gate  # AutoEP copies the source's weight into it

        def projection(self) -> torch.Tensor:
            return self.gate.weight

        def forward(self, x_TH: torch.Tensor, expert_bias: object = None) -> tuple[torch.Tensor, ...]:
            weights_TK, indices_TK, counts_E = super().forward(x_TH)
            # What AutoEP's kernels were written for: indices that `view` can flatten, counts in int32.
            return weights_TK, indices_TK.contiguous(), counts_E.to(torch.int32)

    return AutoEPRouter


def _experts_class(rate: float) -> type[GroupedExperts]:
    class Experts(GroupedExperts):
        """AutoEP's grouped experts, with the model's dropout in training mode."""

        def forward(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
            dropping = self.training and rate > 0
            self.activation = DROPOUT_ACTIVATION if dropping else "swiglu"
            self.activation_alpha = rate
            return super().forward(x, num_tokens_per_expert)

    return Experts


@contextmanager
def model_parts(config: MoEGPTConfig) -> Iterator[None]:
    """While open, AutoEP builds its layers with the model's router and experts."""
    theirs = auto_ep_layer.TokenChoiceTopKRouter, auto_ep_layer.GroupedExperts
    auto_ep_layer.TokenChoiceTopKRouter = _router_class(config)
    auto_ep_layer.GroupedExperts = _experts_class(config.expert_dropout)
    try:
        yield
    finally:
        auto_ep_layer.TokenChoiceTopKRouter, auto_ep_layer.GroupedExperts = theirs


def moe_layers(module: nn.Module) -> list[AutoEPMoELayer]:
    """The swapped MoE layers, first to last."""
    return [m for m in module.modules() if isinstance(m, AutoEPMoELayer)]


def check_swapped(module: nn.Module, config: MoEGPTConfig) -> None:
    """Every MoE layer was swapped, routes by the model's router, and its correction bias is an fp32 buffer.

    DeepSpeed 0.19.6 dropped the buffer without a word, and a parameter in its place would be cast to bf16, where a bias step of
    0.001 is lost.
    """
    layers = moe_layers(module)
    if len(layers) != config.num_hidden_layers:
        raise RuntimeError(f"AutoEP swapped {len(layers)} of {config.num_hidden_layers} MoE layers")
    for number, layer in enumerate(layers):
        if not isinstance(layer.router, Router):
            raise RuntimeError(f"layer {number}: AutoEP built its own router, {type(layer.router).__name__}")
        bias = dict(layer.router.named_buffers()).get("e_score_correction_bias")
        if bias is None or bias.dtype != torch.float32:
            kind = "missing" if bias is None else str(bias.dtype)
            raise RuntimeError(f"layer {number}: the correction bias must be an fp32 buffer, it is {kind}")
