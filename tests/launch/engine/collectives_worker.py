"""A rank that counts the collectives of each micro-step of an optimizer step, under ZeRO 1 and 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from launch.engine import strategy
from launch.engine.build import build_engine, build_model
from launch.ranks import join
from model import MoEGPTConfig

PATH = strategy.CONFIG_FOLDER / "cpu_ep2_zero2.json"
ACCUMULATION = 3


class Collectives(TorchDispatchMode):
    """Bytes of each call, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            size = max((t.numel() * t.element_size() for t in tensors), default=0)
            self.bytes.setdefault(func._schema.name.split("::")[-1], []).append(size)
        return func(*args, **(kwargs or {}))


def count(stage: int) -> list[dict[str, list[int]]]:
    """Of each micro-step of the second optimizer step."""
    config = MoEGPTConfig.preset("tiny", vocab_size=512, hidden_size=64, num_hidden_layers=2, moe_intermediate_size=32)
    settings = strategy.with_mode(strategy.read_config(PATH), "none")
    settings.update(train_batch_size=2 * ACCUMULATION, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=ACCUMULATION)
    settings["zero_optimization"]["stage"] = stage
    settings = strategy.resolve_config(settings, PATH, world_size=2, num_experts=8, max_steps=3)
    engine = build_engine(build_model(config, seed=0, attn_implementation="flash"), settings)
    ids = torch.randint(0, 512, (1, 33))
    found = []
    for _ in range(2 * ACCUMULATION):
        with Collectives() as seen:
            loss = engine(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
            engine.backward(loss)
            engine.step()
        found.append(seen.bytes)
    # Experts too: DeepSpeed sums theirs over the ranks that hold the same ones, here each with itself.
    held = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    return [*found[ACCUMULATION:], {"held": [held]}]


join.set_environment()
join.start(timeout=120)
result = {str(stage): count(stage) for stage in (1, 2)}
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(result))
