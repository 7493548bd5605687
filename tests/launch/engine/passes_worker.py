"""A rank that counts the bytes which ZeRO-2 moves in a micro-step that is not the first, and in an optimizer step.

passes_worker.py OUTPUT
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from launch.benchmarks.op_count.counter import FREE, bytes_of, tensors_of
from launch.engine import strategy
from launch.engine.build import build_engine, build_model
from launch.ranks import join
from model import MoEGPTConfig


class Bytes(TorchDispatchMode):
    """Of what is called from ZeRO's file, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if func.namespace != "c10d" and not func.is_view and name not in FREE and from_zero():
            self.found[self.phase] += bytes_of(name, func, tensors_of((args, kwargs)), tensors_of(out))
        return out


def from_zero() -> bool:
    frame = sys._getframe(2)
    while frame is not None and "stage_1_and_2" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


join.set_environment()
join.start(timeout=120)
ranks = dist.get_world_size()
path = strategy.CONFIG_FOLDER / f"cpu_ep{ranks}_zero2.json"
settings = strategy.with_mode(strategy.read_config(path), "none")
settings.update(train_batch_size=2 * ranks, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2)
settings = strategy.resolve_config(settings, path, world_size=ranks, num_experts=8, max_steps=3)
engine = build_engine(build_model(MoEGPTConfig.preset("tiny"), seed=0, attn_implementation="flash"), settings)
ids = torch.randint(0, 512, (1, 33))
with Bytes() as count:
    for phase in ("", "", "first", "micro step"):  # of the second optimizer step, when all state is there
        loss = engine(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
        count.phase = phase
        engine.backward(loss)
        count.phase = "step" if phase == "micro step" else ""
        engine.step()
if dist.get_rank() == 0:
    held = sum(p.numel() for p in engine.module.parameters())
    shard = sum(int(size) for size in engine.optimizer.partition_size)
    Path(sys.argv[1]).write_text(json.dumps({**count.found, "held": held, "shard": shard}))
