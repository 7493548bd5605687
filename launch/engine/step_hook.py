"""A veto on the optimizer step: the global gradient norm is shown to a judge before any weight changes.

DeepSpeed computes the norm inside `optimizer.step`, where it skips the whole step when the norm is not finite. The hook wraps
the method that computes the norm and answers with DeepSpeed's own sign for "invalid" (-1) where the judge objects: the
step is then discarded by the same path as an overflow, on every rank, gradients cleared and schedule not advanced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

#: From the global gradient norm to a reason not to take the step, or None.
ReasonToSkip = Callable[[float], "str | None"]
INVALID_NORM = -1.0


class StepHook:
    """Wraps the engine's optimizer; `step(reason_to_skip)` takes or skips the step. The same on every rank.

    The engine's `gradient_clipping` stays DeepSpeed's, but for ZeRO stage 0, whose fp32 clipping averages the norms of
    different experts over ranks (DeepSpeed issue 8475): there `clip` is applied here, each expert counted once.
    """

    def __init__(self, engine: DeepSpeedEngine, *, clip: float = 0.0) -> None:
        self.engine, self.clip = engine, clip
        self.grad_norm = 0.0
        self.overflowed = False  # fp16: gradients beyond its range, and the next step's loss scale is smaller
        self.reason: str | None = None
        self._reason_to_skip: ReasonToSkip = lambda _: None
        optimizer = engine.optimizer
        self._overflow: bool | None = None  # as DeepSpeed has seen it, while its loss scale waits
        if isinstance(optimizer, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)):
            self._update_scale = optimizer._update_scale
            optimizer._update_scale = self._update_scale_later
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            self._norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = self._norm_or_invalid
        elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._norm_groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = self._norm_groups_or_invalid
        elif isinstance(optimizer, BF16_Optimizer):
            self._step = optimizer.step
            optimizer.step = self._step_with_norm_judged
        else:
            self._step = optimizer.step
            optimizer.step = self._step_unless_objected

    def step(self, reason_to_skip: ReasonToSkip) -> str | None:
        """Take the engine's step unless `reason_to_skip(global gradient norm)` gives a reason not to; returns the reason."""
        self.grad_norm, self.reason, self._reason_to_skip, self._overflow = math.inf, None, reason_to_skip, None
        self.engine.step()
        if self._overflow is not None and (self.reason is None or math.isinf(self.grad_norm)):
            self._update_scale(self._overflow)
        if self.reason is None and not self.engine.was_step_applied():
            self.reason = reason_to_skip(math.inf) or "the gradients are not finite"  # DeepSpeed saw it before the norm was taken
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        self.overflowed = getattr(scaler, "dynamic", False) and math.isinf(self.grad_norm)
        if self.reason is not None:
            self._drop_gradients()
        return self.reason

    def _update_scale_later(self, has_overflow: bool = False) -> None:
        """DeepSpeed 0.19.8 has the next step's loss scale before it divides this step's gradients by it, which are then half as
        large whenever it grows; and takes a step that was refused for one that overflowed, which at the smallest scale raises."""
        self._overflow = has_overflow

    def _drop_gradients(self) -> None:
        """DeepSpeed 0.19.8 clears the gradients of a skipped step but for ZeRO-2 with optimizer offload, where they would be
        added to the next step's (its norm doubles; after a NaN every later step is NaN)."""
        optimizer = self.engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None

    def _objects_to(self, norm: float) -> bool:
        scale = getattr(self.engine.optimizer, "loss_scale", None) or 1.0  # the gradients' of fp16, still in them
        self.grad_norm = norm / scale if norm >= 0 else math.inf  # DeepSpeed marks inf and NaN as -1
        self.reason = self._reason_to_skip(self.grad_norm)
        return self.reason is not None

    def _norm_or_invalid(self, norm_type: int = 2) -> torch.Tensor:
        norm = self._norm(norm_type)
        return torch.full_like(norm, INVALID_NORM) if self._objects_to(float(norm)) else norm

    def _norm_groups_or_invalid(self) -> list[torch.Tensor]:
        groups = self._norm_groups()
        return [torch.full_like(groups[0], INVALID_NORM)] if self._objects_to(float(combine_grad_norm_groups(groups))) else groups

    def _step_with_norm_judged(self, *args: Any, **kwargs: Any) -> Any:
        """ZeRO 1 in bf16. What the parameters hold there are this rank's own gradients; those of all ranks are the optimizer's,
        and it asks a function of its module whether their norm is valid."""
        theirs = bf16_optimizer.is_invalid_grad_norm
        with patch.object(bf16_optimizer, "is_invalid_grad_norm", lambda norm: self._objects_to(float(norm)) or theirs(norm)):
            return self._step(*args, **kwargs)

    def _step_unless_objected(self, *args: Any, **kwargs: Any) -> Any:
        norm = unsharded_grad_norm(self.engine.module)
        # The engine reads this of ZeRO's optimizers: a skipped step must not advance the learning rate.
        self.engine.optimizer.overflow = self._objects_to(norm)
        if self.engine.optimizer.overflow:
            return None
        if self.clip and norm > self.clip:
            for parameter in self.engine.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.clip / (norm + 1e-6))
        return self._step(*args, **kwargs)


def unsharded_grad_norm(module: torch.nn.Module) -> float:
    """Global 2-norm of gradients that ZeRO does not shard; experts that live on other ranks are counted once each."""
    squares: dict[str, torch.Tensor] = {}  # by group of experts, "" for what every rank has; on the device all along
    for parameter in module.parameters():
        if parameter.grad is None:
            continue
        name = "" if getattr(parameter, "allreduce", True) else str(getattr(parameter, "group_name", ""))
        square = parameter.grad.double().square().sum()
        squares[name] = squares[name] + square if name in squares else square
    for name in sorted(squares.keys() - {""}):
        dist.all_reduce(squares[name], group=groups._get_expert_parallel_group(name))
    return math.sqrt(float(sum(squares.values())))
