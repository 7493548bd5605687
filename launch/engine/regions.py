"""`torch.compile` of the regions that are one graph each: of every block all that comes before its experts.

`"compile": {"autoep_non_moe": true}` in the DeepSpeed JSON asks for it. DeepSpeed's own `engine.compile` compiles the parents
of AutoEP's layers, which here are blocks: under activation checkpointing their forward begins with a call that is never
traced, and nothing at all would be compiled. The region lies inside of that call, has static shapes (the rows that experts
exchange never come into it), and is compiled once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from data.cli import UserError
from launch.engine.refused import COMPILE
from launch.engine.strategy import Strategy
from model.attention import product_dtype
from model.flash import pick_kernel
from model.modeling import Block


def compile_regions(model: nn.Module, backend: str = "inductor") -> list[Block]:
    """Every block's `attend` in one graph; returns the blocks. A region that is not one graph is an error, not a slow run."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        check_traceable(block)
        compiled = torch.compile(block.attend, fullgraph=True, dynamic=False, backend=backend)
        vars(block)["attend"] = _in_training(block, compiled, block.attend)
    return blocks


def check_traceable(block: Block) -> None:
    """Raises UserError where the attention's kernel is one that dynamo cannot trace."""
    config, x = block.self_attn.config, block.self_attn.q_proj.weight
    kernel = pick_kernel(x.device, product_dtype(x), config.head_dim) if config._attn_implementation == "flash" else None
    if kernel is not None and not kernel.traceable:
        raise UserError(f"{COMPILE} cannot trace {kernel.name}, which is the attention here; --no-compile leaves it out")


def _in_training(block: Block, compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """An evaluation watches the sinks from inside of the region, layer by layer: each would be compiled for itself."""

    def attend(*arguments: Any) -> Any:
        return (compiled if block.training else eager)(*arguments)

    return attend


def compile_hint(strategy: Strategy) -> str | None:
    """What a user who compiles under `selective` should know: `model.rebuild` makes nothing again of a region that is traced."""
    if not strategy.compiles or strategy.activation_checkpointing != "selective":
        return None
    return (
        "warning: of compiled regions the compiler chooses what is kept, so that of activation checkpointing's `selective` only "
        "the experts' half of a block is left; `full`, or --no-compile, takes less memory"
    )
