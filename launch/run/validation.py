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
    #: Mean share of the attention that goes to the sinks, a layer; of the last evaluation, and empty where the kernel has none.
    sink_mass: list[float] = field(default_factory=list)

    def judged_on(self) -> dict[str, Any]:
        """What two evaluations must have in common to be compared. JSON-able."""
        return {"fingerprint": self.data.fingerprint, "samples": self.samples}

    def mean_loss(self) -> float:
        """Mean over all targets of all ranks, in nats a token."""
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        masses: list[Tensor] = []
        with torch.no_grad(), watching_sink_mass(masses.append):
            for number, batch in enumerate(self.batches()):
                self.on_phase(f"evaluation, batch {number}")
                loss = self.engine(**batch, num_items_in_batch=1).loss
                sums += torch.stack([loss.double(), (batch["shift_labels"] != IGNORED).sum().double()])
        self.engine.train()
        self.sink_mass = self.mean_sink_mass(masses)
        dist.all_reduce(sums)
        total, targets = sums.tolist()
        return float(total / targets)

    def mean_sink_mass(self, masses: list[Tensor]) -> list[float]:
        """By layer, over all batches and ranks. `masses`: one of each attention, layer after layer, batch after batch."""
        layers = int(self.engine.module.config.num_hidden_layers)
        if not masses or len(masses) % layers:
            return []
        mean_Y = torch.stack(masses).double().view(-1, layers).mean(dim=0)
        dist.all_reduce(mean_Y)
        return [float(mass) for mass in (mean_Y / dist.get_world_size()).tolist()]

    def bits_per_byte(self, loss: float) -> float:
        """The loss in a unit that does not depend on the tokenizer."""
        return loss / math.log(2) / self.data.text_bytes_per_token(self.samples)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """This rank's share in micro-batches. Every rank yields equally many (under expert parallelism a forward pass is
        collective); what stands past the end is there for its shape and has no targets."""
        micro_batch = self.engine.train_micro_batch_size_per_gpu()
        offset = dist.get_rank() * micro_batch
        for first in range(offset, self.samples + offset, micro_batch * dist.get_world_size()):
            wanted = range(first, first + micro_batch)
            batch = self.data.batch([min(i, self.samples - 1) for i in wanted])
            batch["shift_labels"][[i >= self.samples for i in wanted]] = IGNORED
            yield on_device(batch, self.engine.device)
