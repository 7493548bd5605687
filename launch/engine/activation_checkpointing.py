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
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)
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


def _is_kept(operation: Any) -> bool:
    return operation in KEPT or getattr(operation, "namespace", None) in FLASH_NAMESPACES


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operation) else CheckpointPolicy.PREFER_RECOMPUTE


class _Recomputation(_CachedTorchDispatchMode):
    """Asks for what was kept and nothing else. torch 2.13 wants the very operations of the forward again, and under ZeRO stage 3
    a weight is gathered by more or fewer of them, depending on what was fetched ahead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(func):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def selective_contexts() -> tuple[Any, Any]:
    """Around a block's forward and around its recomputation."""
    forward, recomputation = create_selective_checkpoint_contexts(_policy)
    return forward, _Recomputation(_policy, recomputation.storage, False)


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
        function = partial(checkpoint, use_reentrant=False, context_fn=selective_contexts)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
