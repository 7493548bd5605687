"""From a model and a resolved DeepSpeed JSON to an engine whose promises are checked."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from data.cli import UserError, sentence
from launch.engine import activation_checkpointing, expert_parallel, hardware, passes, schedules
from launch.engine.regions import compile_regions
from launch.engine.strategy import Strategy
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.accounting import built_parameters, count_parameters


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norms, biases and sinks (vectors) do not. DeepSpeed needs their names for MoE."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    kept = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decay"},
        {"params": kept, "weight_decay": 0.0, "name": "no_decay"},
    ]


def check_room(config: MoEGPTConfig, ep_size: int) -> None:
    """Raises UserError where all the memory of a rank's device is less than building the model and its engine takes."""
    built, room = 4 * built_parameters(config, ep_size), hardware.memory()
    if built > room:
        raise UserError(
            f"the model has {count_parameters(config).total:,} parameters, and each rank builds it in fp32, with its own experts "
            f"beside: {built / 1e9:,.1f} GB, and its device has {room / 1e9:,.1f} GB of memory; train a smaller one, or on another "
            "device"
        )


def group_hint(config: MoEGPTConfig) -> str | None:
    """What a user should know who lets a token choose experts of one group only: nothing says which group."""
    if config.n_group == 1 or config.topk_group > 1 or not config.norm_topk_prob:
        return None
    return (
        f"warning: of {config.n_group} groups a token's experts all lie in one (topk_group 1) and their weights are normalised, so "
        "that the loss cannot teach the router which group; n_group 1, or several groups of which two are chosen, learn more"
    )


def build_model(config: MoEGPTConfig, *, seed: int, attn_implementation: str) -> MoEGPTForCausalLM:
    """The model in fp32 with weights that depend on the seed and the kind of device alone, the same on every rank."""
    config._attn_implementation = attn_implementation
    torch.manual_seed(seed)
    # On the GPU at once: eight ranks with a copy of the 4b preset each would take 140 GB of host memory.
    with torch.device(get_accelerator().current_device_name()):
        return MoEGPTForCausalLM(config)


def build_engine(model: MoEGPTForCausalLM, deepspeed_config: dict[str, Any]) -> DeepSpeedEngine:
    """`deepspeed.initialize` with AutoEP, activation checkpointing and the checks after it. Collective.

    Raises UserError for what DeepSpeed does not combine.
    """
    strategy = Strategy.of(deepspeed_config)
    activation_checkpointing.enable(model, strategy.activation_checkpointing, deepspeed_config)
    groups = parameter_groups(model, strategy.weight_decay)
    passes.keep_freed_memory()
    with expert_parallel.model_parts(model.config), _without_memory_prints():
        theirs = without_our_keys(deepspeed_config, strategy)
        try:
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=groups, config=theirs, lr_scheduler=schedules.made_here(deepspeed_config)
            )
        except (AssertionError, NotImplementedError, ValueError) as error:  # how it says that settings do not go together
            raise UserError(f"DeepSpeed refuses these settings of --deepspeed_config: {sentence(error)}") from error
    passes.after_engine(engine.optimizer)
    expert_parallel.check_swapped(engine.module, model.config)
    if strategy.zero_stage == 3:
        expert_parallel.register_router_weights(engine.module)
    if strategy.compiles:
        with torch.autocast(engine.device.type, engine.torch_autocast_dtype(), engine.torch_autocast_enabled()):
            compile_regions(engine.module)
    return engine


def _without_memory_prints() -> AbstractContextManager[Any]:
    """Under ZeRO 1 in bf16 DeepSpeed prints what memory is used, three lines a parameter group, whatever its log level."""
    return patch.object(bf16_optimizer, "see_memory_usage", lambda *_, **__: None)


def without_our_keys(deepspeed_config: dict[str, Any], strategy: Strategy) -> dict[str, Any]:
    """What DeepSpeed is given: a copy without what this system does itself."""
    theirs = copy.deepcopy(deepspeed_config)
    theirs.get("activation_checkpointing", {}).pop("mode", None)
    if strategy.zero_stage == 0:
        theirs["gradient_clipping"] = 0.0  # the StepHook clips, see there
    return theirs
