"""What the JSON says holds after a load, whatever the checkpoint holds; unchanged, nothing changes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.lr_schedules import WarmupCosineLR

from launch.engine.settings import EngineSettings, counting, give_own_steps


def engine(
    lr: float = 0.01, decay: float = 0.1, clip: float = 1.0, total: int = 40, scaler: Any = None, schedule: Any = None
) -> Any:
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    groups = [{"params": weights[:1], "weight_decay": decay}, {"params": weights[1:], "weight_decay": 0.0}]
    optimizer: Any = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    optimizer.clip_grad, optimizer.loss_scaler = clip, scaler or LossScaler(1.0)
    made = schedule(optimizer) if schedule else WarmupCosineLR(optimizer, total, warmup_num_steps=4, warmup_type="linear")
    return SimpleNamespace(optimizer=optimizer, lr_scheduler=made)


def train(of: Any, steps: int) -> None:
    for _ in range(steps):
        for group in of.optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.ones_like(weight)
        of.optimizer.step()
        of.lr_scheduler.step()


def load(into: Any, saved: Any) -> None:
    """As DeepSpeed does: groups, clipping, loss scaler and the schedule's count are the checkpoint's."""
    into.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
    into.optimizer.clip_grad = saved.optimizer.clip_grad
    into.optimizer.loss_scaler = copy.deepcopy(saved.optimizer.loss_scaler)
    into.lr_scheduler.load_state_dict(saved.lr_scheduler.state_dict())


def groups(of: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in of.optimizer.param_groups]


def test_an_unchanged_json_changes_nothing() -> None:
    saved, resumed = engine(), engine()
    train(saved, 9)
    settings = EngineSettings(resumed)
    load(resumed, saved)
    loaded = groups(resumed)
    settings.apply()
    assert groups(resumed) == loaded == groups(saved)
    train(saved, 5)
    train(resumed, 5)
    assert groups(resumed) == groups(saved)


@pytest.mark.parametrize("clip", [0.25, 0.0])
def test_changed_values_hold_from_the_first_step_on(clip: float) -> None:
    saved, resumed, whole = engine(), engine(lr=0.1, decay=0.5, clip=clip, total=80), engine(lr=0.1, decay=0.5, total=80)
    train(saved, 9)
    train(whole, 9)  # where the new schedule would be by itself
    settings = EngineSettings(resumed)
    load(resumed, saved)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.1 and resumed.optimizer.clip_grad == 1.0
    settings.apply()
    assert [group["lr"] for group in groups(resumed)] == [group["lr"] for group in groups(whole)]
    assert [group["weight_decay"] for group in groups(resumed)] == [0.5, 0.0]
    assert resumed.optimizer.clip_grad == clip
    assert resumed.lr_scheduler.last_batch_iteration == saved.lr_scheduler.last_batch_iteration


def test_changed_betas_hold() -> None:
    """A schedule that cycles them owns them; any other does not."""
    saved, resumed = engine(), engine()
    train(saved, 2)
    for group in resumed.optimizer.param_groups:
        group["betas"] = (0.8, 0.99)
    settings = EngineSettings(resumed)
    load(resumed, saved)
    settings.apply()
    assert [group["betas"] for group in groups(resumed)] == [(0.8, 0.99)] * 2


def test_without_a_schedule_the_rate_is_the_json_s() -> None:
    saved, resumed = engine(lr=0.01), engine(lr=0.2)
    for of, lr in ((saved, 0.01), (resumed, 0.2)):
        of.lr_scheduler = None
        for group, times in zip(of.optimizer.param_groups, (1, 3), strict=True):  # Muon's are two rates
            group["lr"] = times * lr  # which the schedule had warmed up from 0
    settings = EngineSettings(resumed)
    resumed.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
    settings.apply()
    assert [group["lr"] for group in groups(resumed)] == [0.2, 3 * 0.2]


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_a_schedule_of_torch_s(gamma: float) -> None:
    def schedule(rate: float) -> Any:
        return lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, rate)

    saved, resumed = engine(schedule=schedule(0.5)), engine(lr=0.2, schedule=schedule(gamma))
    train(saved, 3)
    settings = EngineSettings(resumed)
    load(resumed, saved)
    settings.apply()
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * gamma**3)
    train(resumed, 1)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * gamma**4)


TORCHS = {
    "ExponentialLR": {"gamma": 0.9},
    "MultiStepLR": {"milestones": [2, 5]},
    "PolynomialLR": {"total_iters": 20},
    "CosineAnnealingLR": {"T_max": 20},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
}


@pytest.mark.parametrize("kind", TORCHS)
def test_with_an_unchanged_json_a_schedule_of_torch_s_goes_on_to_the_bit(kind: str) -> None:
    """Of one that restarts the period began anew at each resume, and closed forms round otherwise than the steps."""

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return getattr(torch.optim.lr_scheduler, kind)(optimizer, **TORCHS[kind])

    saved, resumed = engine(schedule=schedule), engine(schedule=schedule)
    train(saved, 9)
    settings = EngineSettings(resumed)
    load(resumed, saved)
    settings.apply()
    for _ in range(8):
        assert groups(resumed) == groups(saved)
        train(saved, 1)
        train(resumed, 1)


@pytest.mark.parametrize(
    ("kind", "changes"), [("CosineAnnealingWarmRestarts", {}), ("OneCycleLR", {"max_lr": 0.7}), ("ExponentialLR", {})]
)
def test_a_changed_rate_holds_from_the_first_step_on(kind: str, changes: dict[str, float]) -> None:
    """Where torch has no closed form the first step was at the old rate."""

    def schedule(**changes: float) -> Any:
        return lambda optimizer: getattr(torch.optim.lr_scheduler, kind)(optimizer, **{**TORCHS[kind], **changes})

    saved, resumed, whole = (engine(lr=lr, schedule=schedule(**now)) for lr, now in ((0.01, {}), (0.1, changes), (0.1, changes)))
    train(saved, 9)
    train(whole, 9)
    settings = EngineSettings(resumed)
    load(resumed, saved)
    settings.apply()
    for _ in range(3):
        assert [group["lr"] for group in groups(resumed)] == pytest.approx([group["lr"] for group in groups(whole)])
        train(resumed, 1)
        train(whole, 1)


def test_changed_milestones_hold() -> None:
    def schedule(*milestones: int) -> Any:
        return lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)

    saved, resumed = engine(lr=0.01, schedule=schedule(2, 5)), engine(lr=0.01, schedule=schedule(2, 50))
    train(saved, 9)
    settings = EngineSettings(resumed)
    load(resumed, saved)
    settings.apply()
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert resumed.lr_scheduler.get_last_lr() == [group["lr"] for group in groups(resumed)], "or another is logged"


def test_loss_scaling() -> None:
    """A dynamic scale goes on with the new settings; a static one is the JSON's."""
    old = DynamicLossScaler(2.0**16, 1000, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
    new = copy.deepcopy(old)
    new.scale_window = 50
    saved, resumed = engine(scaler=old), engine(scaler=new)
    old.cur_scale, old.cur_iter, old.last_overflow_iter, old.cur_hysteresis = 512.0, 77, 70, 1
    settings = EngineSettings(resumed)
    load(resumed, saved)
    settings.apply()
    found = resumed.optimizer.loss_scaler
    assert (found.cur_scale, found.cur_iter, found.scale_window) == (512.0, 77, 50)
    assert (found.last_overflow_iter, found.cur_hysteresis) == (70, 1)
    static = engine(scaler=LossScaler(128.0))
    settings = EngineSettings(static)
    load(static, saved)
    settings.apply()
    assert static.optimizer.loss_scaler.cur_scale == 128.0
    dynamic = engine(scaler=new)
    settings = EngineSettings(dynamic)
    load(dynamic, static)
    settings.apply()
    assert dynamic.optimizer.loss_scaler is new, "the static one of the file would never adapt"


@pytest.mark.parametrize("wrapped", [True, False], ids=["in ZeRO's", "without ZeRO"])
def test_the_steps_that_count_are_of_the_adam_inside(wrapped: bool) -> None:
    weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    adam = torch.optim.AdamW([weight], capturable=True)
    muon: Any = torch.optim.SGD([weight])
    muon.aux_optimizer = adam
    assert counting(SimpleNamespace(optimizer=muon) if wrapped else muon) is adam
    assert counting(SimpleNamespace(optimizer=adam) if wrapped else adam) is adam
    adam.state[weight], adam.state[torch.empty(1)] = {"step": torch.tensor(5.0)}, {}
    give_own_steps(adam)
    assert adam.state[weight]["step"].device.type == "meta", "a step in a graph of a GPU counts there"


@pytest.mark.parametrize("fused", [True, False])
def test_a_changed_fused_finds_the_steps_where_its_kernel_reads_them(fused: bool) -> None:
    """On a GPU (here: the meta device), and not where the checkpoint's optimizer had them: of a CPU, or not fused."""
    weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    resumed = SimpleNamespace(optimizer=torch.optim.AdamW([weight]), lr_scheduler=None)
    resumed.optimizer.param_groups[0]["fused"] = fused
    settings = EngineSettings(resumed)  # type: ignore[arg-type]
    resumed.optimizer.param_groups[0]["fused"] = not fused
    resumed.optimizer.state[weight] = {"step": torch.tensor(5.0, device="cpu")}
    settings.apply()
    assert resumed.optimizer.state[weight]["step"].device.type == ("meta" if fused else "cpu")
