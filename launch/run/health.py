"""What a run says about its routers and its steps beyond loss and norm, under the names that the field uses.

`launch/METRICS.md` says what each number means and when to worry. Shapes: Y layers, E experts.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def violations(load_YE: Tensor) -> tuple[list[float], list[float]]:
    """(max_vio, min_vio) of each layer: the busiest expert's load over the mean, less 1, and 1 less the idlest one's.

    max_vio is that of arXiv 2408.15664: 0 is even, E / top-k - 1 all tokens to the same experts. min_vio is 1 where an expert
    gets nothing. A layer without any load is even.
    """
    load_YE = load_YE.double()
    mean_Y = load_YE.mean(dim=1).clamp(min=1e-9)
    highest_Y, lowest_Y = load_YE.amax(dim=1) / mean_Y - 1, 1 - load_YE.amin(dim=1) / mean_Y
    nothing_Y = load_YE.sum(dim=1) == 0
    both = torch.stack((highest_Y, lowest_Y)).masked_fill(nothing_Y, 0.0)
    most, least = both.tolist()
    return most, least


def forget_peak() -> None:
    """From here on `memory_bytes` of a GPU is training's: each rank has built the whole model in fp32, which with many expert ranks
    is the most that it ever holds."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def memory_bytes() -> float:
    """The most that this process has held: of a GPU in tensors since `forget_peak`, of a CPU all of it."""
    if torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float, and NaN stays NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(kw_only=True)
class Health:
    """Counts from one row of metrics to the next. `take` and `snapshot` are for every rank alike; `take` is collective.

    `clip` is the norm that gradients are clipped to, 0 for never; `interval` the steps between two snapshots, 0 for none.
    """

    clip: float
    interval: int
    clipped: int = 0
    data_seconds: float = 0.0
    step_load_YE: Tensor | None = None
    window_load_YE: Tensor | None = field(default=None, repr=False)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - began

    def is_detailed(self, step: int) -> bool:
        return bool(self.interval) and step % self.interval == 0

    def count_step(self, grad_norm: float, load_YE: Tensor | None) -> None:
        """A step that was taken; `load_YE` is what the balancer counted on all ranks. Nothing here waits for the device."""
        self.clipped += bool(self.clip) and grad_norm > self.clip
        self.step_load_YE = load_YE
        if load_YE is not None:
            self.window_load_YE = load_YE.clone() if self.window_load_YE is None else self.window_load_YE + load_YE

    def skip_step(self) -> None:
        """A step that was not taken routes for nothing."""
        self.step_load_YE = None

    def take(self, *, loss: float, seconds: float, steps: int, memory: float, device: torch.device) -> dict[str, Any]:
        """The numbers since the last row: `seconds` and `steps` are the timer's, `memory` this rank's bytes."""
        # Of all ranks the one that waits longest and holds most: the others wait for it.
        worst = torch.tensor([memory / 1e9, self.data_seconds], dtype=torch.float64, device=device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        gigabytes, waited = worst.tolist()
        count = max(1, steps)
        row: dict[str, Any] = {"perplexity": perplexity(loss), "memory_gb": gigabytes}
        row.update(step_seconds=seconds / count, data_seconds=waited / count)
        if self.clip:
            row["clipped_share"] = self.clipped / count
        if self.step_load_YE is not None:
            row["max_vio"], row["min_vio"] = violations(self.step_load_YE)
        if self.window_load_YE is not None:
            row["max_vio_window"], _ = violations(self.window_load_YE)
        self.clipped, self.data_seconds, self.window_load_YE, self.step_load_YE = 0, 0.0, None, None
        return row

    def snapshot(self, ratios: dict[str, float]) -> dict[str, Any]:
        """Every expert's tokens of this step, and the size of the update over that of the weights."""
        row: dict[str, Any] = {"update_to_weight": ratios} if ratios else {}
        if self.step_load_YE is not None:
            row["expert_load"] = self.step_load_YE.tolist()
        return row
