"""What the judge of a step is shown, in fp16 too, whose gradients still hold the loss scale, and what follows; DeepSpeed's
optimizers without an engine."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from launch.engine import step_hook
from launch.engine.step_hook import StepHook, unsharded_grad_norm

DYNAMIC = DynamicLossScaler(65536.0, 1000, 1.0, 2, False)


def hook(kind: type, norm: float, scaler: Any) -> StepHook:
    """Of an engine whose optimizer finds this norm of its scaled gradients."""
    optimizer: Any = object.__new__(kind)
    vars(optimizer).update(loss_scaler=scaler, custom_loss_scaler=False, cpu_offload=False)
    optimizer.scaled_global_norm = lambda norm_type=2: torch.tensor(norm)
    optimizer._get_norm_groups = lambda: [torch.tensor(norm * 0.6), torch.tensor(norm * 0.8)]
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
    assert judged == [of.grad_norm] == [pytest.approx(0.5)] and not of.overflowed


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
    engine.step = lambda: None  # not at a boundary: no step, so that nothing follows from the one before
    of.step(lambda found: reason)
    assert scaler.loss_scale == after


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
@pytest.mark.parametrize(("scaler", "overflowed"), [(DYNAMIC, True), (LossScaler(128.0), False), (LossScaler(1.0), False)])
def test_an_overflow_is_one_where_a_smaller_scale_follows(kind: type, scaler: Any, overflowed: bool) -> None:
    of = hook(kind, -1.0, scaler)  # DeepSpeed's sign for inf and NaN
    assert of.step(lambda norm: None if math.isfinite(norm) else "not finite") == "not finite"
    assert of.overflowed == overflowed and of.grad_norm == math.inf


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
def test_gradients_of_zero_are_finite(kind: type) -> None:
    of = hook(kind, 0.0, LossScaler(1.0))
    assert of.step(lambda norm: None if math.isfinite(norm) else "not finite") is None and of.grad_norm == 0


@pytest.mark.parametrize("reason", [None, "a spike"])
def test_a_step_that_deepspeed_did_not_take_has_a_reason(reason: str | None) -> None:
    """Also where it saw the overflow before it took any norm, and the judge has nothing to say of one that is infinite."""
    of = hook(DeepSpeedZeroOptimizer, 0.5, DYNAMIC)
    of.engine.step, of.engine.was_step_applied = lambda: None, lambda: False
    assert of.step(lambda norm: reason) == (reason or "the gradients are not finite") and of.overflowed


@pytest.mark.parametrize("reason", [None, "a spike"])
def test_a_refused_step_leaves_no_gradients_to_the_next(reason: str | None) -> None:
    of = hook(DeepSpeedZeroOptimizer, 0.5, LossScaler(1.0))
    gradients = of.engine.optimizer.averaged_gradients = {0: [torch.ones(2)], 1: [torch.ones(3)]}
    of.engine.optimizer.cpu_offload = True
    of.step(lambda norm: reason)
    assert [kept is None for kept in gradients.values()] == [reason is not None] * 2


def test_zero_1_in_bf16_asks_the_judge_in_a_step_alone() -> None:
    """By a function of DeepSpeed's module, which every engine of the process shares."""
    theirs, seen = bf16_optimizer.is_invalid_grad_norm, []
    optimizer = object.__new__(BF16_Optimizer)
    found = [0.5, 0.5, math.nan]
    optimizer.step = lambda: seen.append(bf16_optimizer.is_invalid_grad_norm(torch.tensor(found[len(seen)])))
    engine: Any = SimpleNamespace(optimizer=optimizer, was_step_applied=lambda: True)
    engine.step = lambda: optimizer.step()
    of = StepHook(engine)
    assert of.step(lambda norm: None) is None and of.step(lambda norm: "a spike") == "a spike"
    assert seen == [False, True] and of.grad_norm == 0.5
    of.step(lambda norm: None)
    assert seen[2], "what DeepSpeed itself finds invalid stays so"
    assert bf16_optimizer.is_invalid_grad_norm is theirs


@pytest.mark.parametrize("clip", [0.0, 2.0, 8.0])
def test_without_zero_the_gradients_are_clipped_here(clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert's and the others', but for a parameter without one."""
    module = torch.nn.ParameterList([torch.ones(1), torch.ones(1), torch.ones(1)])
    module[0].grad, module[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])
    module[1].allreduce, module[1].group_name = False, "ep_size_1"
    monkeypatch.setattr("deepspeed.utils.groups._get_expert_parallel_group", lambda name: name)
    monkeypatch.setattr(step_hook.dist, "all_reduce", lambda square, group: None)
    taken: list[list[float]] = []
    optimizer = SimpleNamespace(step=lambda: taken.append([float(module[n].grad) for n in (0, 1)]))
    engine: Any = SimpleNamespace(optimizer=optimizer, module=module, was_step_applied=lambda: True)
    engine.step = lambda: optimizer.step()
    of = StepHook(engine, clip=clip)
    assert of.step(lambda norm: "a spike") == "a spike" and not taken
    assert optimizer.overflow, "or the engine goes on to the next learning rate"
    assert of.step(lambda norm: None) is None and of.grad_norm == 5 and not optimizer.overflow
    assert taken == [pytest.approx([1.2, -1.6] if clip == 2 else [3, -4], rel=1e-6)]


def test_a_norm_without_zero_counts_other_ranks_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.ParameterList([torch.ones(1), torch.ones(1), torch.ones(1)])
    for parameter, gradient in zip(module, (2.0, 3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    for expert in list(module)[1:]:
        expert.allreduce, expert.group_name = False, "ep_size_2"
    monkeypatch.setattr("deepspeed.utils.groups._get_expert_parallel_group", lambda name: f"group of {name}")
    reduced: list[object] = []

    def all_reduce(square: torch.Tensor, group: object) -> None:
        reduced.append((float(square), group))
        square += 7.0

    monkeypatch.setattr(step_hook.dist, "all_reduce", all_reduce)
    assert unsharded_grad_norm(module) == 6  # of 4 + (9 + 16 + 7)
    assert reduced == [(25.0, "group of ep_size_2")]


def test_a_large_norm_without_zero_is_not_infinite() -> None:
    """The square of 1e20 is, in fp32, and a step with such a norm is skipped."""
    (parameter,) = module = torch.nn.ParameterList([torch.ones(2)])
    parameter.grad = torch.full((2,), 1e20)
    assert unsharded_grad_norm(module) == pytest.approx(2**0.5 * 1e20)


def test_groups_of_experts_are_summed_in_one_order_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in that of a set of names, which is another in every process."""
    names, reduced = [f"ep_size_{2**n}" for n in range(9)], list[str]()
    module = torch.nn.ParameterList([torch.ones(1) for _ in names])
    for parameter, name in zip(module, names[::2] + names[1::2], strict=True):
        parameter.grad, parameter.allreduce, parameter.group_name = torch.ones(1), False, name
    monkeypatch.setattr("deepspeed.utils.groups._get_expert_parallel_group", lambda name: name)
    monkeypatch.setattr(step_hook.dist, "all_reduce", lambda square, group: reduced.append(group))
    unsharded_grad_norm(module)
    assert reduced == sorted(names)
