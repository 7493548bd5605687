"""The mixture-of-experts layer, forward and backward: ours beside transformers' Glm4Moe with the same weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

from data.flags import at_least_one
from launch.benchmarks.measure import add_measuring_flags, peak_bytes, print_table, seconds_each, settings_of
from launch.toolchain import default_device
from model import MoEGPTConfig
from model.accounting import attention_matrices, forward_flops_per_token
from model.moe import MoE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_flags(parser, repeats=3)
    parser.add_argument("--model", default="800m", help="preset whose MoE layer is measured")
    parser.add_argument("--tokens", type=int, default=2048 if default_device() == "cpu" else 16_384, help="tokens in a batch")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`{"rows": {name: {"ms", "peak_mb", "tflops", "speedup", "difference"}}}`; prints the table too."""
    at_least_one(args, "tokens", "repeats")
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = MoEGPTConfig.preset(args.model)
    layers = build(config, device, dtype)
    shape = (1 + args.repeats, 1, args.tokens, config.hidden_size)
    inputs = [x.requires_grad_() for x in torch.randn(shape, device=device, dtype=dtype).unbind()]
    flops = 3 * args.tokens * layer_flops(config)
    calls = {name: training(layer, inputs) for name, layer in layers.items()}
    times = seconds_each(calls, device, args.repeats)
    rows = {name: {"ms": 1e3 * times[name], "peak_mb": peak_bytes(calls[name], device) / 2**20} for name in calls}
    for row in rows.values():
        row["tflops"] = flops / row["ms"] / 1e9
    outputs = {name: layer(inputs[0]).detach().float() for name, layer in layers.items()}
    reference = outputs["transformers (loop)"]
    for name, row in rows.items():
        row["speedup"] = rows["transformers (loop)"]["ms"] / row["ms"]
        row["difference"] = float((outputs[name] - reference).norm() / reference.norm())
    title = f"MoE layer of {args.model}, forward + backward, {args.device}, {args.dtype}, {args.tokens} tokens"
    columns = ["ms", "peak_mb", "tflops", "speedup", "difference"]
    print_table(title, ["", *columns], [[name, *(row[c] for c in columns)] for name, row in rows.items()])
    return {"rows": rows, "settings": settings_of(args)}


def training(layer: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], None]:
    """Forward and backward of other tokens each time: in training experts hardly ever have as many rows as before."""
    turn = cycle(inputs)

    def once() -> None:
        x = next(turn)
        out = layer(x)
        out.backward(out.detach())
        x.grad = None
        layer.zero_grad()

    return once


def layer_flops(config: MoEGPTConfig) -> float:
    """Of one token's forward through one MoE layer: a layer's matrices without attention's."""
    whole = forward_flops_per_token(config, 0) - 2 * config.vocab_size * config.hidden_size
    return whole / config.num_hidden_layers - 2 * attention_matrices(config)


def build(config: MoEGPTConfig, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layers by name, all with the weights of ours."""
    ours = MoE(config)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.02)
    names = ["hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"]
    names += ["n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"]
    layers: dict[str, nn.Module] = {"ours": ours}
    for label, implementation in {"loop": "eager", "grouped_mm": "grouped_mm"}.items():
        theirs_config = Glm4MoeConfig(**{name: getattr(config, name) for name in names})
        theirs_config._experts_implementation = implementation
        theirs = Glm4MoeMoE(theirs_config)
        theirs.load_state_dict(ours.state_dict())
        layers[f"transformers ({label})"] = theirs
    for layer in layers.values():
        layer.to(device, dtype)
    return layers
