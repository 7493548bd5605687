"""Activation checkpointing, driven by the DeepSpeed JSON's section of that name.

DeepSpeed reads the section but applies it only to models that call its checkpoint function themselves; here it really switches
the model's blocks:

    none       keep every activation
    selective  recompute the cheap half of what a block keeps (norms, RoPE, activations), keep matrix products and attention
    full       keep only each block's input; `cpu_checkpointing: true` moves those to host memory
"""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

aten = torch.ops.aten
#: Outputs worth their memory: a matrix product or an attention costs more to redo than to keep.
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._grouped_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._flash_attention_forward.default,
}


#: Where the flash-attn packages register their operators; by name, so that none of them needs to be imported.
FLASH_NAMESPACES = ("flash_attn", "flash_attn_3")


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = operation in KEPT or getattr(operation, "namespace", None) in FLASH_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def enable(model: PreTrainedModel, mode: str, deepspeed_config: dict[str, Any]) -> None:
    """Switch the model's blocks to `mode`. Call it before `deepspeed.initialize`."""
    if mode == "none":
        return
    if mode == "full":
        section = deepspeed_config.get("activation_checkpointing", {})
        deepspeed.checkpointing.configure(
            None,
            partition_activations=section.get("partition_activations", False),
            contiguous_checkpointing=section.get("contiguous_memory_optimization", False),
            num_checkpoints=section.get("number_checkpoints"),
            # On a CPU they are there already, and DeepSpeed's copy would free the tensor that it aliases.
            checkpoint_in_cpu=section.get("cpu_checkpointing", False) and get_accelerator().device_name() != "cpu",
            synchronize=section.get("synchronize_checkpoint_boundary", False),
            profile=section.get("profile", False),
        )
        function = deepspeed.checkpointing.checkpoint
    else:
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        function = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
