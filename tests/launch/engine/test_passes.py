"""On a CPU memory that is freed is used again without the kernel, a norm in pieces is the norm; ZeRO moves what is said."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from nursery import Nursery
from support import ROOT

from launch.engine.passes import PIECE, after_engine
from launch.planning.time import HELD_BYTES, SHARD_BYTES, STEP_BYTES

#: Page faults of a block of 64 MiB that is made for the third time, before and after.
FAULTS = """
import resource, torch
from launch.engine.passes import keep_freed_memory

def faults():
    for turn in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_used_again() -> None:
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    before, after = map(int, done.stdout.split()[-2:])
    assert before > 1000 > 10 * after


class Recording(DeepSpeedZeroOptimizer):
    def __init__(self) -> None:
        self.seen: list[tuple[int, object]] = []

    def get_grad_norm_direct(
        self, gradients: Sequence[torch.Tensor], params: Sequence[object], norm_type: float = 2
    ) -> torch.Tensor:
        self.seen = [(gradient.numel(), owner) for gradient, owner in zip(gradients, params, strict=True)]
        return torch.stack([gradient.double().norm() for gradient in gradients]).square().sum().sqrt().float()


def test_a_norm_in_pieces_is_the_norm_without_padding() -> None:
    optimizer, owners = Recording(), [SimpleNamespace(), SimpleNamespace(), SimpleNamespace()]
    after_engine(optimizer)
    gradients = [torch.randn(3, PIECE - 5), torch.full((7,), torch.inf), torch.randn(11), torch.randn(PIECE)]
    gradients[1]._zero_padding = True  # type: ignore[attr-defined]
    norm = optimizer.get_grad_norm_direct(gradients, owners)
    kept = [gradients[0], *gradients[2:]]
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in kept]).double().norm()), rel=1e-7)
    assert [size for size, _ in optimizer.seen] == [PIECE, PIECE, PIECE - 15, 11, PIECE]
    assert [owner for _, owner in optimizer.seen] == [owners[0]] * 3 + owners[1:]


def test_other_optimizers_stay_as_they_are() -> None:
    optimizer = SimpleNamespace(get_grad_norm_direct=None)
    after_engine(optimizer)
    assert optimizer.get_grad_norm_direct is None


def test_a_gradient_is_added_in_its_sums_type() -> None:
    optimizer, total, gradient = Recording(), torch.randn(100), torch.randn(100).bfloat16()
    after_engine(optimizer)
    expected = total + gradient.float()
    optimizer._add_to_grad_partition_buffer(total, gradient)
    optimizer._add_to_grad_partition_buffer(None, gradient)
    assert torch.equal(total, expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_moves_the_bytes_that_the_planner_says(nursery: Nursery, tmp_path: Path, ranks: int) -> None:
    """Counted in an engine, of operations that ZeRO calls, collectives aside."""
    running = nursery.start(ranks, "tests/launch/engine/passes_worker.py", tmp_path / "out.json", log=tmp_path / "log")
    assert running.wait(180) == [0] * ranks, running.text()[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    held, shard = found["held"], found["shard"]
    assert found["micro step"] == pytest.approx(HELD_BYTES * held + SHARD_BYTES * shard, rel=0.02)
    # the fused AdamW writes three of the four that it reads; the sums are zeroed in the first micro-step
    assert found["step"] + 12 * shard + 4 * shard == pytest.approx(STEP_BYTES * shard, rel=0.02)
