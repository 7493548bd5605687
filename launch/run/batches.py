"""The batches of a step, gathered while the step before it computes.

What a step is trained on is a pure function of the samples consumed before it. So the next step's can be gathered ahead by a
thread, from a cold disk too, and whatever comes (a rollback, a resume, another number of ranks) the order is the same: what was
gathered for another place is thrown away.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from data.dataset import PackedDataset
from launch.toolchain import trains_on_gpu

Batch = dict[str, Tensor]
#: Stays on the host: the model reads off it where documents begin, and would have to wait for a GPU to tell.
ON_HOST = "position_ids"


class StepBatches(NamedTuple):
    """One rank's micro-batches of a step, and the number of targets in the whole global batch."""

    micro_batches: list[Batch]
    targets: int


class BatchLoader:
    """Gathers for one rank. The dataset is the thread's alone: nothing else may use it meanwhile."""

    def __init__(
        self,
        data: PackedDataset,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        accumulation: int,
        device: torch.device,
    ) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.device = device
        self.pins = trains_on_gpu()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[StepBatches]] | None = None

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    def step(self, samples: int) -> StepBatches:
        """The step that begins after so many samples, on the device; the one after it is gathered from now on."""
        ahead, self._ahead = self._ahead, None
        future = ahead[1] if ahead is not None and ahead[0] == samples else self._thread.submit(self._gather, samples)
        gathered = future.result()
        after = samples + self.global_batch
        self._ahead = after, self._thread.submit(self._gather, after)
        return gathered._replace(micro_batches=[on_device(batch, self.device) for batch in gathered.micro_batches])

    def close(self) -> None:
        """End the thread; what it is gathering is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _gather(self, samples: int) -> StepBatches:
        batches = []
        for number in range(self.accumulation):
            first = samples + (number * self.world_size + self.rank) * self.micro_batch
            batch = self.data.batch(range(first, first + self.micro_batch))
            batches.append({name: get_accelerator().pin_memory(x) for name, x in batch.items()} if self.pins else batch)
        return StepBatches(batches, self.data.count_targets(range(samples, samples + self.global_batch)))


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Copied behind the work that is queued there, without waiting for it where the memory is pinned."""
    return {name: x if name == ON_HOST else x.to(device, non_blocking=True) for name, x in batch.items()}
