"""Gathered ahead or not, a step's batches are a function of the samples consumed; and they are gathered while others compute."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from support import OLD

from data.dataset import PackedDataset
from launch.run import batches
from launch.run.batches import Batch, BatchLoader


@pytest.fixture(params=[False, True], ids=["packed", "documents"])
def data(request: pytest.FixtureRequest) -> PackedDataset:
    return PackedDataset([OLD / "tokens"], split="train", sequence_length=64, seed=3, document_mask=request.param)


def loader(data: Any, rank: int = 0, world_size: int = 2) -> BatchLoader:
    return BatchLoader(data, rank=rank, world_size=world_size, micro_batch=2, accumulation=3, device=torch.device("cpu"))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_samples_of_a_step_are_those_of_the_rule(data: PackedDataset, rank: int) -> None:
    """Across the edge of an epoch, after a jump back (a rollback's data position stays, a resume's does not) and a repetition."""
    one = loader(data, rank)
    for samples in (0, 12, 24, 24, 120, 132, 12, 24, len(data) // 12 * 12):
        first = [samples + (number * 2 + rank) * 2 for number in range(3)]
        assert_same(one.step(samples).micro_batches, [data.batch([i, i + 1]) for i in first])
    one.close()


def test_the_targets_are_those_of_all_ranks(data: PackedDataset) -> None:
    without = 0
    for samples in range(0, len(data), 12):
        steps = [loader(data, rank).step(samples) for rank in (0, 1)]
        labels = [batch["shift_labels"] for step in steps for batch in step.micro_batches]
        counted = sum(int((x != -100).sum()) for x in labels)
        assert [step.targets for step in steps] == [counted, counted]
        without += 12 * 64 - counted
    assert (without > 0) == data.document_mask, "there are boundaries, where they count"


class Slow:
    """Data on a disk that takes a while."""

    def __init__(self, data: PackedDataset) -> None:
        self.data, self.gathered, self.threads = data, threading.Event(), set[str]()
        self.failing = False

    def batch(self, indices: range) -> Batch:
        self.threads.add(threading.current_thread().name)
        if self.failing:
            raise OSError("the disk is gone")
        time.sleep(0.05)
        self.gathered.set()
        return self.data.batch(indices)

    def count_targets(self, indices: range) -> int:
        return self.data.count_targets(indices)


def test_the_next_step_is_gathered_while_this_one_computes(data: PackedDataset) -> None:
    slow = Slow(data)
    one = loader(slow)
    one.step(0)
    slow.gathered.clear()
    assert slow.gathered.wait(10), "nobody asked for it yet"
    time.sleep(0.3)  # what computing takes
    started = time.monotonic()
    one.step(12)
    assert time.monotonic() - started < 0.1, "it was there already"
    assert all(name.startswith("batches") for name in slow.threads)
    one.close()


def test_a_fault_ahead_is_raised_by_the_step_that_needs_the_data(data: PackedDataset) -> None:
    slow = Slow(data)
    one = loader(slow)
    slow.failing = True
    with pytest.raises(OSError, match="the disk is gone"):
        one.step(0)
    slow.failing = False
    one.step(0)
    assert one._ahead is not None
    one._ahead[1].result()
    slow.failing = True
    one.step(12)  # it was gathered before the disk went
    with pytest.raises(OSError, match="the disk is gone"):
        one.step(24)
    one.close()


def test_on_a_gpu_memory_is_pinned_by_the_thread(data: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[str] = []

    class Accelerator:
        def pin_memory(self, x: torch.Tensor) -> torch.Tensor:
            pinned.append(threading.current_thread().name)
            return x

    monkeypatch.setattr(batches, "get_accelerator", Accelerator)
    monkeypatch.setattr(batches, "trains_on_gpu", lambda: True)
    one = BatchLoader(data, rank=0, world_size=2, micro_batch=2, accumulation=3, device=torch.device("meta"))
    [batch, *_], _ = one.step(0)
    assert batch["input_ids"].device.type == batch["shift_labels"].device.type == "meta"
    assert "position_ids" not in batch or batch["position_ids"].device.type == "cpu", "the model reads it on the host"
    assert len(pinned) >= 6 and all(name.startswith("batches") for name in pinned)
    one.close()
