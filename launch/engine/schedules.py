"""Learning-rate schedules: DeepSpeed's and PyTorch's by name, and warm-up, stable, decay (WSD), which neither has."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from torch.optim import Optimizer

#: The share of the peak rate that is left at a share p of the decay, above `decay_min_ratio`.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1.0 - p,
    "sqrt": lambda p: 1.0 - math.sqrt(p),
    "cosine": lambda p: (1.0 + math.cos(math.pi * p)) / 2.0,
}


class WarmupStableDecayLR(lr_schedules.WarmupCosineLR):  # type: ignore[misc]
    """Warm-up to the optimizer's rate, that rate until `decay_num_steps` before the end, then down to `decay_min_ratio` of it.

    Up to the decay nothing depends on `total_num_steps`, so one run serves several lengths: resume a checkpoint of the stable part
    with another length. Source: MiniCPM (arXiv 2404.06395, section 4); "sqrt" is the 1 - sqrt of arXiv 2405.18392. Steps count as
    in DeepSpeed's WarmupCosineLR. Raises ValueError for a decay that does not fit into the steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        warmup_type: str = lr_schedules.WARMUP_LINEAR_RATE,
        decay_num_steps: int = 1000,
        decay_type: str = "sqrt",
        decay_min_ratio: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        if decay_type not in DECAYS:
            raise ValueError(f"decay_type must be one of {', '.join(DECAYS)}, not {decay_type!r}")
        if not 0 < decay_num_steps <= total_num_steps:
            raise ValueError(f"decay_num_steps must be 1 to total_num_steps ({total_num_steps}), not {decay_num_steps}")
        if not 0.0 <= decay_min_ratio <= 1.0:
            raise ValueError(f"decay_min_ratio must be 0 to 1, not {decay_min_ratio}")
        self.decay_num_steps, self.decay_type, self.decay_min_ratio = decay_num_steps, decay_type, decay_min_ratio
        super().__init__(
            optimizer,
            total_num_steps,
            warmup_min_ratio=warmup_min_ratio,
            warmup_num_steps=warmup_num_steps,
            warmup_type=warmup_type,
            last_batch_iteration=last_batch_iteration,
        )

    def get_lr_ratio(self) -> float:
        if self.last_batch_iteration < self.warmup_num_steps:
            return float(super().get_lr_ratio())
        into_decay = self.last_batch_iteration + 1 - (self.total_num_steps - self.decay_num_steps)
        share = min(1.0, max(0, into_decay) / self.decay_num_steps)
        return self.decay_min_ratio + (1.0 - self.decay_min_ratio) * DECAYS[self.decay_type](share)


OURS = {"WarmupStableDecayLR": WarmupStableDecayLR}
#: What takes an optimizer that DeepSpeed has wrapped.
NAMES = (*OURS, *lr_schedules.VALID_LR_SCHEDULES)


def find(kind: str) -> Any | None:
    """The class of a `scheduler.type`, or None."""
    found = OURS.get(kind) or getattr(lr_schedules, kind, None) or getattr(torch.optim.lr_scheduler, kind, None)
    return found if inspect.isclass(found) else None


def is_torchs(kind: str) -> bool:
    return kind not in OURS and not hasattr(lr_schedules, kind)


def made_here(deepspeed_config: dict[str, Any]) -> Callable[[Optimizer], Any] | None:
    """What makes the schedule of a resolved JSON from its optimizer, where DeepSpeed does not know it."""
    section = deepspeed_config.get("scheduler") or {}
    ours = OURS.get(str(section.get("type")))
    return None if ours is None else lambda optimizer: ours(optimizer, **section.get("params") or {})
