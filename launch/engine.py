"""From a model and a resolved DeepSpeed JSON to an engine whose promises are checked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from launch import activation_checkpointing, expert_parallel
from launch.deepspeed_config import lookup
from model import MoEGPTConfig, MoEGPTForCausalLM


def load_model_config(model: str, **overrides: Any) -> MoEGPTConfig:
    """A preset by name, or the `config.json` at a path. Errors: `ValueError` that names the presets."""
    path = Path(model)
    if path.suffix != ".json":
        return MoEGPTConfig.preset(model, **overrides)
    if not path.is_file():
        raise FileNotFoundError(f"--model {model} is not a file; name a config.json or a preset")
    config = MoEGPTConfig.from_json_file(path)
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norms, biases and sinks (vectors) do not. DeepSpeed needs their names for MoE."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    kept = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decay"},
        {"params": kept, "weight_decay": 0.0, "name": "no_decay"},
    ]


def build_model(config: MoEGPTConfig, *, seed: int, attn_implementation: str) -> MoEGPTForCausalLM:
    """The model in fp32 with weights that depend on the seed and the kind of device alone, the same on every rank."""
    config._attn_implementation = attn_implementation
    torch.manual_seed(seed)
    # On the GPU at once: eight ranks with a copy of the 4b preset each would take 140 GB of host memory.
    with torch.device(get_accelerator().current_device_name()):
        return MoEGPTForCausalLM(config)


def build_engine(model: MoEGPTForCausalLM, deepspeed_config: dict[str, Any], *, mode: str | None = None) -> DeepSpeedEngine:
    """`deepspeed.initialize` with AutoEP, activation checkpointing and the checks after it. Collective.

    `mode` overrides the JSON's `activation_checkpointing.mode`.
    """
    deepspeed_config = copy.deepcopy(deepspeed_config)
    activation_checkpointing.enable(
        model, mode or lookup(deepspeed_config, "activation_checkpointing.mode", "none"), deepspeed_config
    )
    if "activation_checkpointing" in deepspeed_config:
        deepspeed_config["activation_checkpointing"].pop("mode", None)  # ours; DeepSpeed owns the other keys
    stage = lookup(deepspeed_config, "zero_optimization.stage", 0)
    if stage == 0:
        deepspeed_config["gradient_clipping"] = 0.0  # applied by the StepGuard, see there
    weight_decay = lookup(deepspeed_config, "optimizer.params.weight_decay", 0.0)
    with expert_parallel.model_parts(model.config):
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model, weight_decay), config=deepspeed_config
        )
    expert_parallel.check_swapped(engine.module, model.config)
    return engine


def peak_flops() -> float | None:
    """Dense bf16 peak of the GPU in FLOP/s by the vendor's data sheets; None where it is not known (no MFU then)."""
    if get_accelerator().device_name() != "cuda":
        return None
    name = torch.cuda.get_device_name()
    # The first that matches counts: "H100 PCIe" before "H100", "A100" last of its family.
    table = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12}
    table.update({"A100": 312e12, "A800": 312e12, "L40S": 362e12, "A10G": 70e12, "4090": 165e12})
    return next((flops for key, flops in table.items() if key in name), None)
