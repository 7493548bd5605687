"""Activation checkpointing, driven by the DeepSpeed JSON's section of that name.

DeepSpeed reads the section but applies it only to models that call its checkpoint function themselves; here it really switches
the model's blocks:

    none       keep every activation
    selective  keep less: what norms, RoPE, SwiGLU and the rows' gather put out is made again; nothing else runs twice
    full       keep only each block's input; `cpu_checkpointing: true` moves those to host memory
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from launch.toolchain import trains_on_gpu
from model.modeling import Block


def enable(model: PreTrainedModel, mode: str, deepspeed_config: dict[str, Any]) -> None:
    """Switch the model's blocks to `mode`. Call it before `deepspeed.initialize`."""
    if mode == "selective":
        for module in model.modules():
            if isinstance(module, Block):
                module.rebuilds = True
    if mode != "full":
        return
    section = deepspeed_config.get("activation_checkpointing", {})
    deepspeed.checkpointing.configure(
        None,
        # On a CPU they are there already, and DeepSpeed's copy would free the tensor that it aliases.
        checkpoint_in_cpu=section.get("cpu_checkpointing", False) and trains_on_gpu(),
        synchronize=section.get("synchronize_checkpoint_boundary", False),
        profile=section.get("profile", False),
    )
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpoint)


def checkpoint(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """DeepSpeed's, which recomputes the block outside of the engine's autocast: here within what that was in the forward."""
    device = get_accelerator().device_name()
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def computed_alike(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype, enabled):
            return block(*args, **kwargs)

    return deepspeed.checkpointing.checkpoint(computed_alike, *args, **kwargs)
