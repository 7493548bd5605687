"""What the judge of a step is shown in fp16, whose gradients still hold the loss scale; DeepSpeed's optimizer without an engine."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from launch.engine.step_hook import StepHook

DYNAMIC = DynamicLossScaler(65536.0, 1000, 1.0, 2, False)


def hook(kind: type, norm: float, scaler: Any) -> StepHook:
    """Of an engine whose optimizer finds this norm of its scaled gradients."""
    optimizer: Any = object.__new__(kind)
    vars(optimizer).update(loss_scaler=scaler, custom_loss_scaler=False, cpu_offload=False)
    optimizer.scaled_global_norm = lambda norm_type=2: torch.tensor(norm)
    optimizer._get_norm_groups = lambda: [torch.tensor(norm)]
    engine: Any = SimpleNamespace(optimizer=optimizer, was_step_applied=lambda: True)
    two_or_less = kind is DeepSpeedZeroOptimizer
    engine.step = lambda: optimizer.scaled_global_norm() if two_or_less else optimizer._get_norm_groups()
    return StepHook(engine)


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
@pytest.mark.parametrize(("scaler", "scale"), [(DYNAMIC, 65536.0), (LossScaler(128.0), 128.0), (LossScaler(1.0), 1.0)])
def test_the_norm_is_that_of_the_gradients_and_not_of_the_scaled_ones(kind: type, scaler: Any, scale: float) -> None:
    """A scale that doubled was a norm that doubled: at 6 sigma a spike, skipped."""
    judged: list[float] = []
    of = hook(kind, 0.5 * scale, scaler)
    assert of.step(lambda norm: judged.append(norm)) is None  # type: ignore[func-returns-value]
    assert judged == [0.5] and of.grad_norm == 0.5 and not of.overflowed


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
@pytest.mark.parametrize(
    ("norm", "reason", "after"),
    [(8.0, None, 16.0), (8.0, "a spike", 8.0), (-1.0, None, 4.0)],
    ids=["a step after which it grows", "a step refused", "an overflow"],
)
def test_the_loss_scale_is_the_next_steps(
    kind: type, norm: float, reason: str | None, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grew before the gradients were divided by it, and fell for a spike, which at the smallest scale ended the run."""
    scaler = DynamicLossScaler(8.0, scale_window=1, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
    scaler.cur_iter = 1  # its first step grows nothing
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist", SimpleNamespace(get_rank=lambda: 1))  # rank 0 would say so
    engine = (of := hook(kind, norm, scaler)).engine
    optimizer, seen = engine.optimizer, []

    def step() -> None:  # as DeepSpeed's, from the norm to the division
        found = optimizer.scaled_global_norm() if kind is DeepSpeedZeroOptimizer else optimizer._get_norm_groups()[0]
        optimizer._update_scale(float(found) < 0)
        seen.append(scaler.loss_scale)

    engine.step = step
    of.step(lambda found: reason if math.isfinite(found) else "not finite")
    assert seen == [8.0] and scaler.loss_scale == after


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
@pytest.mark.parametrize(("scaler", "overflowed"), [(DYNAMIC, True), (LossScaler(128.0), False), (LossScaler(1.0), False)])
def test_an_overflow_is_one_where_a_smaller_scale_follows(kind: type, scaler: Any, overflowed: bool) -> None:
    of = hook(kind, -1.0, scaler)  # DeepSpeed's sign for inf and NaN
    assert of.step(lambda norm: None if math.isfinite(norm) else "not finite") == "not finite"
    assert of.overflowed == overflowed and of.grad_norm == math.inf
