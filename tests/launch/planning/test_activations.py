"""What the formula says a forward keeps, against PyTorch's own memory tracker on fake tensors: no bytes are allocated, so that
whole models can be asked. The plain model without DeepSpeed; test_memory.py has the engine."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from planner_job import job
from support import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from launch.engine import activation_checkpointing
from launch.planning.activations import chunk_rows, kept_activations
from launch.planning.job import Job
from launch.planning.memory import exchange_bytes
from model import MoEGPTConfig, MoEGPTForCausalLM, loss
from model.config_json import load_sizes

TOLERANCE = 0.10


def grouped_in_fp32(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Shapes and kept tensors of `grouped_mm`, whose fake version takes bf16 alone."""
    return x @ weight[0] if weight.dim() == 3 else (x @ weight).expand(offs.numel(), -1, -1).contiguous()


def trace(one: Job, config: MoEGPTConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by MemTracker: what a forward leaves behind for the backward, and the most there was until the backward's end."""
    torch.set_default_dtype(dtype)
    patch = pytest.MonkeyPatch()
    if dtype == torch.float32:
        patch.setattr(torch.nn.functional, "grouped_mm", grouped_in_fp32)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
            network = MoEGPTForCausalLM(config)
            torch.set_default_dtype(torch.float32)
            recompute(network, one.activation_checkpointing)
            network.train()
            ids = torch.randint(0, one.sizes.vocab_size, (one.micro_batch_size, one.sequence_length))
            tracker = MemTracker()
            tracker.track_external(network)
            with tracker:
                before = total(tracker, "current")
                value = network(input_ids=ids, shift_labels=ids, num_items_in_batch=torch.tensor(float(ids.numel()))).loss
                gc.collect()
                kept = total(tracker, "current") - before
                value.backward()
                return {"kept": kept, "most": total(tracker, "peak") - before}
    finally:
        torch.set_default_dtype(torch.float32)
        patch.undo()


def total(tracker: MemTracker, kind: str) -> int:
    return int(tracker.get_tracker_snapshot(kind)[torch.device("cpu")]["Total"])


def recompute(network: MoEGPTForCausalLM, mode: str) -> None:
    """As `launch.engine.activation_checkpointing` does; DeepSpeed's own function needs a process group."""
    if mode != "full":
        activation_checkpointing.enable(network, mode, {})
        return
    network._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=True))


def off(model: str, mode: str, dtype: torch.dtype, length: int, batch: int, **changes: int) -> list[str]:
    """Differences beyond `TOLERANCE`, in words."""
    one = job(
        sizes=dataclasses.replace(load_sizes(model), **changes),
        sequence_length=length,
        micro_batch_size=batch,
        activation_checkpointing=mode,
        ranks=1,
        ep_size=1,
        weight_bytes=dtype.itemsize,
    )
    kept, found = kept_activations(one, kernels=False), trace(one, MoEGPTConfig.preset(model, **changes), dtype)
    head = one.sizes.vocab_size * one.sizes.hidden_size * one.weight_bytes  # whose gradient is there first
    gradients, block = one.local_parameters * one.weight_bytes, kept.recomputed + kept.working
    planned = {
        "kept": kept.held + kept.loss_kept,
        # in the head's forward, in the first block's backward, and in the last one's, with all gradients but the embedding's
        "most": max(kept.held + kept.loss, kept.held + block + head, gradients - head + block, gradients),
    }
    lines = []
    for name, value in planned.items():
        line = f"{model} {mode} {dtype} {batch} x {length}: {name} planned {value / 1e6:.2f} MB, traced {found[name] / 1e6:.2f} MB"
        print(line)
        if value != pytest.approx(found[name], rel=TOLERANCE):
            lines.append(line)
    return lines


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("none", torch.bfloat16), ("selective", torch.bfloat16), ("full", torch.bfloat16), ("none", torch.float32)],
    ids=str,
)
def test_half_of_tiny(mode: str, dtype: torch.dtype) -> None:
    """Two layers: the tracker takes seconds a layer."""
    assert not off("tiny", mode, dtype, 512, 4, num_hidden_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(("model", "length", "batch"), [("tiny", 512, 4), ("60m", 2048, 1), ("800m", 2048, 1)])
def test_whole_models(model: str, length: int, batch: int, mode: str, dtype: torch.dtype) -> None:
    assert not off(model, mode, dtype, length, batch)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 8])
def test_with_kernels(ranks: int) -> None:
    """A GPU's way, whose tensors a CPU never holds: against a count on `meta` tensors."""
    command = [sys.executable, "tests/launch/planning/kernel_memory_worker.py", str(ranks)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = []
    for found in json.loads(done.stdout.splitlines()[-1]):
        one = job(
            sizes=dataclasses.replace(load_sizes(found["model"]), num_hidden_layers=found["layers"]),
            sequence_length=found["length"],
            micro_batch_size=found["batch"],
            activation_checkpointing=found["mode"],
            ranks=ranks,
            ep_size=ranks,
        )
        kept, exchange = kept_activations(one), exchange_bytes(one, kernels=True)
        head = one.sizes.vocab_size * one.sizes.hidden_size * one.weight_bytes
        # in the backward of a block's experts their gradients, and two of the three weights joined
        experts = 0 if found["mode"] == "full" else 5 / 3 * one.expert_parameters * one.weight_bytes / found["layers"]
        most = kept.held + max(kept.loss, kept.recomputed + kept.working + exchange + head + experts)
        for name, value in (("held", kept.held + kept.loss_kept), ("most", most)):
            line = f"{found['model']} {found['mode']}: {name} planned {value / 1e6:.1f} MB, counted {found[name] / 1e6:.1f} MB"
            print(line)
            if value != pytest.approx(found[name], rel=0.03):
                lines.append(line)
    assert not lines


def test_chunks_of_the_loss_are_those_of_the_model() -> None:
    """The constants of model/loss.py, asked by running it and looking at the logits' shapes."""
    seen = []
    original = loss.chunk_loss

    def watch(x_CH: torch.Tensor, *rest: Any) -> Any:
        seen.append(x_CH.shape[0])
        return original(x_CH, *rest)

    for model in ("tiny", "60m", "800m"):
        seen.clear()
        sizes = load_sizes(model)
        x = torch.zeros(4096, sizes.hidden_size, device="meta", requires_grad=True)
        head = torch.zeros(sizes.vocab_size, sizes.hidden_size, device="meta")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "chunk_loss", watch)
            loss.token_loss(x, head, torch.zeros(4096, dtype=torch.long, device="meta"), 4096.0)
        assert seen[0] == chunk_rows(job(model, sequence_length=4096, micro_batch_size=1), kernels=False)
