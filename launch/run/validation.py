"""The validation loss: over the same samples at every call and for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from data.dataset import IGNORED, PackedDataset
from launch.run.batches import on_device
from model.sinks import watching_sink_mass


@dataclass(kw_only=True)
class Validation:
    """Judges `engine` on the first `samples` of `data`. Collective."""

    engine: DeepSpeedEngine
    data: PackedDataset
    samples: int
    on_phase: Callable[[str], None]  # told of every batch, for the watchdog
    #: Mean share of the attention that goes to the sinks, a layer; over the samples of the last evaluation, and empty where the
    #: kernel has none.
    sink_mass: list[float] = field(default_factory=list)

    def judged_on(self) -> dict[str, Any]:
        """What two evaluations must have in common to be compared. JSON-able."""
        return {"fingerprint": self.data.fingerprint, "samples": self.samples}

    def mean_loss(self) -> float:
        """Mean over all targets of all ranks, in nats a token."""
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        masses: list[Tensor] = []  # of one batch, from each layer
        mass_sums: list[Tensor] = []  # [Y], one a batch
        with torch.no_grad(), watching_sink_mass(masses.append):
            for number, (batch, real) in enumerate(self.batches()):
                self.on_phase(f"evaluation, batch {number}")
                loss = self.engine(**batch, num_items_in_batch=1).loss
                sums += torch.stack([loss.double(), (batch["shift_labels"] != IGNORED).sum().double()])
                if masses:
                    mass_sums.append(sum_over_samples(torch.stack(masses), len(batch["shift_labels"]), real))
                    masses.clear()
        self.engine.train()
        self.sink_mass = self.mean_sink_mass(mass_sums)
        dist.all_reduce(sums)
        total, targets = sums.tolist()
        return float(total / targets)

    def mean_sink_mass(self, mass_sums: list[Tensor]) -> list[float]:
        """By layer, over all samples. `mass_sums`: of each batch of this rank the sums over its samples, `[Y]`."""
        if not mass_sums:
            return []
        mass_Y = torch.stack(mass_sums).sum(dim=0)
        dist.all_reduce(mass_Y)
        return [float(mass) for mass in (mass_Y / self.samples).tolist()]

    def bits_per_byte(self, loss: float) -> float:
        """The loss in a unit that does not depend on the tokenizer."""
        return loss / math.log(2) / self.data.text_bytes_per_token(self.samples)

    def batches(self) -> Iterator[tuple[dict[str, Tensor], int]]:
        """This rank's share in micro-batches, each with how many of its rows are samples. Every rank yields equally many (under
        expert parallelism a forward pass is collective); what stands past the end is there for its shape and has no targets."""
        micro_batch = self.engine.train_micro_batch_size_per_gpu()
        offset = dist.get_rank() * micro_batch
        for first in range(offset, self.samples + offset, micro_batch * dist.get_world_size()):
            batch = self.data.batch([min(i, self.samples - 1) for i in range(first, first + micro_batch)])
            real = min(max(self.samples - first, 0), micro_batch)
            batch["shift_labels"][real:] = IGNORED
            yield on_device(batch, self.engine.device), real


def sum_over_samples(mass_YT: Tensor, rows: int, real: int) -> Tensor:
    """`[Y]`: of a batch of `rows` samples, the first `real` ones' own means added up, so that batches of any size add up alike."""
    mass_YBS = mass_YT.double().view(len(mass_YT), rows, -1)
    return mass_YBS[:, :real].mean(dim=2).sum(dim=1)
