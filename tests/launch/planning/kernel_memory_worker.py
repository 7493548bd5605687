"""What a forward and backward hold with the kernels of a GPU, counted on `meta` tensors: `kernel_memory_worker.py RANKS`, JSON out.

A process of its own, since it joins a process group that is not there. Knows nothing of the planner.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from launch.benchmarks.op_count import cases
from launch.benchmarks.op_count.counter import Count
from launch.benchmarks.op_count.cuda_kernels import as_on_cuda
from model import MoEGPTConfig

#: Model, sequences, tokens of each, layers.
CASES = (("tiny", 8, 512, 2), ("800m", 8, 2048, 2), ("800m", 16, 2048, 3))


def measure(ranks: int, preset: str, batch: int, length: int, layers: int, mode: str) -> dict[str, Any]:
    config = MoEGPTConfig.preset(preset, num_hidden_layers=layers)
    config._attn_implementation = "flash"
    # DeepSpeed's own way of `full` would copy its inputs to a device.
    model: Any = cases.ours(cases.Case(config=config, ep=ranks, mode="none" if mode == "full" else mode))
    if mode == "full":
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=True))
    ids = torch.empty((batch, length), dtype=torch.int64, device="meta")
    with as_on_cuda(ids.numel() * config.num_experts_per_tok), Count() as count:
        loss = model(input_ids=ids, shift_labels=ids, num_items_in_batch=torch.empty((), device="meta")).loss
        count.end_forward()
        loss.backward()
    found = count.counts
    return {
        "model": preset, "batch": batch, "length": length, "layers": layers, "mode": mode, "held": found.held,
        "most": max(found.most_forward, found.most_backward),
    }  # fmt: skip


if __name__ == "__main__":
    ranks = int(sys.argv[1])
    cases.join_fake_group(ranks)
    print(json.dumps([measure(ranks, *case, mode) for case in CASES for mode in ("none", "selective", "full")]))
