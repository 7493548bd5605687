"""A resumed run obeys its JSON: what a checkpoint also holds of it (rates, decay, clipping, schedule) is put back after a load.

DeepSpeed restores the optimizer's groups, its clipping and its loss scaler as they were saved, so that a changed value would be
ignored without a word, while the schedule computes with the new one: the first step would log one rate and use another.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.lr_schedules import update_lr

#: What counts and adapts in a loss scaler; the rest of it is settings.
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
#: What counts in a schedule; `T_cur` and `T_i` where a cosine of torch's that restarts is in its period.
SCHEDULE_STATE = ("last_batch_iteration", "last_epoch", "_step_count", "_last_lr", "T_cur", "T_i")
#: In a group, by whichever optimizer.
MOMENTUM = ("betas", "momentum")
#: How torch's optimizers compute; none keeps another state for it.
WAYS = {"capturable", "differentiable", "foreach", "fused"}
PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


class EngineSettings:
    """Taken from a new engine, before anything is loaded into it: there all of it is the JSON's. `apply` after every load."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
        self._rates = [float(group["lr"]) for group in engine.optimizer.param_groups]
        self._clip = getattr(engine.optimizer, "clip_grad", None)
        self._scaler = getattr(engine.optimizer, "loss_scaler", None)
        self._scaler_settings = _settings(self._scaler, SCALER_STATE)
        self._schedule_settings = _settings(engine.lr_scheduler, SCHEDULE_STATE)
        # What a schedule writes into the groups is where it is, and no setting.
        self._scheduled = {"lr", *(MOMENTUM if getattr(engine.lr_scheduler, "cycle_momentum", False) else ())}

    def apply(self) -> None:
        """Put the JSON's values back. With an unchanged JSON nothing changes, to the bit."""
        optimizer = self._engine.optimizer
        for group, settings in zip(optimizer.param_groups, self._groups, strict=True):
            group.update({key: value for key, value in settings.items() if key not in self._scheduled})
        if self._clip is not None:
            optimizer.clip_grad = self._clip
        if self._scaler is not None:
            if self._scaler.dynamic and optimizer.loss_scaler.dynamic:
                vars(optimizer.loss_scaler).update(self._scaler_settings)  # and its scale goes on
            else:
                optimizer.loss_scaler = self._scaler
        if isinstance(inner := counting(optimizer), torch.optim.Adam):
            give_own_steps(inner)  # `fused` may have changed, and with it where the kernel reads them
        self._apply_rate()

    def _apply_rate(self) -> None:
        """The rate of the next step: the schedule's for the steps taken, or the JSON's where there is no schedule."""
        schedule, groups = self._engine.lr_scheduler, self._engine.optimizer.param_groups
        if schedule is None:
            update_lr(groups, self._rates)
            return
        changed = any(vars(schedule).get(name) != value for name, value in self._schedule_settings.items())
        vars(schedule).update(self._schedule_settings)
        closed_form = getattr(schedule, "_get_closed_form_lr", None)  # torch's; its `get_lr` goes on from the groups' rate
        if closed_form is not None:
            if changed:  # it rounds otherwise than the steps that led there
                schedule._last_lr = update_lr(groups, closed_form())
        elif getattr(schedule, "last_batch_iteration", -1) >= 0:  # DeepSpeed's
            schedule._last_lr = update_lr(groups, schedule.get_lr())
        elif changed:  # torch's others (one that restarts, one of cycles) compute by their count alone, and warn outside of a step
            with warnings.catch_warnings(action="ignore"):
                schedule._last_lr = update_lr(groups, schedule.get_lr())


def _settings(of: Any, state: tuple[str, ...]) -> dict[str, Any]:
    """Plain values that its constructor was given or computed; not what counts, nor other objects."""
    if of is None:
        return {}
    return {k: v for k, v in vars(of).items() if k not in state and isinstance(v, PLAIN)}


def missing_state(kind: str, held: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What an optimizer with the parameters `now` needs of its state that one with those of `held` did not keep, as `amsgrad` does.

    By a step of one weight. None of DeepSpeed's own classes keeps more for any parameter; AdamW stands for them.
    """
    takes = getattr(torch.optim, kind, torch.optim.AdamW)
    before, after = _stepped(takes, held), _stepped(takes, now)
    settings = {key: value for key, value in after.param_groups[0].items() if key != "params"}
    after.load_state_dict(before.state_dict())
    after.param_groups[0].update(settings)
    try:
        after.step()
    except KeyError as error:
        return str(error.args[0])
    return None


def _stepped(takes: type[torch.optim.Optimizer], params: Mapping[str, Any]) -> torch.optim.Optimizer:
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    weight.grad = torch.ones(1, 1)
    accepted = inspect.signature(takes).parameters.keys() - WAYS
    optimizer = takes([weight], **{name: value for name, value in params.items() if name in accepted})
    optimizer.step()
    return optimizer


def counting(optimizer: Any) -> torch.optim.Optimizer:
    """The one that counts steps, of an engine's: in ZeRO's wrapper, and in Muon, which hands what is no matrix to an Adam of its
    own that has the same state."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return getattr(inner, "aux_optimizer", None) or inner


def give_own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give every state a `step` of its own, where and as the optimizer counts it.

    DeepSpeed puts the tensor into the states that the file held: on the host, where a fused kernel on a GPU would read at that
    address of its own memory, and under ZeRO 3 the same one into all, which then counts once for each group (5, 8, 11, ...).
    """
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if "step" not in state:
            continue
        if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
            device = parameter.device if on_device else torch.device("cpu")
            state["step"] = torch.full((), float(state["step"]), dtype=torch.float32, device=device)
        else:  # DeepSpeed's own count with an int
            state["step"] = int(state["step"])
