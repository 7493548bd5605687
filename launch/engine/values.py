"""A value of the DeepSpeed JSON that cannot be meant: refused before there are ranks, in a sentence.

DeepSpeed's pydantic models check the values of their sections. Optimizer and schedule are not held by a model: `"false"` there is
true, a text is noticed in the middle of the warm-up or never, an unknown kind of warm-up is replaced. So their values are compared
with the defaults of the signatures that take them, and then given to the classes themselves, for their own checks. What is refused
by our own knowledge stands in `refused.py`, which asks no library.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import ADAM_W_MODE, TORCH_ADAM_PARAM, DtypeEnum
from torch.optim.lr_scheduler import LRScheduler

from data.cli import UserError, sentence
from launch.engine import schedules
from launch.engine.kinds import SWITCH, another_kind, is_kind, shown
from launch.engine.refused import check_refused
from launch.engine.strategy import Strategy
from launch.nested import lookup

WARMUP_TYPES = (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
#: What DeepSpeed takes out of an Adam's parameters before it makes one.
SWITCHES = {ADAM_W_MODE, TORCH_ADAM_PARAM, "fp32_optimizer_states"}
#: Of `expert_parallel`, what the layer reads that stands in the place of AutoEP's; and what is true of it beside AutoEP's defaults.
READ = ("enabled", "autoep_size", "preset_model", "use_grouped_mm", "disable_triton_grouped_mm")
ALIKE = (("score_apply", "post"),)
#: Its settings of routing, by the model's own name, which alone is read.
OF_THE_MODEL = {
    "top_k": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_norm": "norm_topk_prob",
    "route_scale": "routed_scaling_factor",
    "routed_scaling_factor": "routed_scaling_factor",
    "num_expert_groups": "n_group",
    "num_limited_groups": "topk_group",
}


def check_values(config: dict[str, Any], path: Path) -> None:
    """Of a resolved JSON whose keys are known. Raises UserError with the file, the key, the value and what would be right."""
    check_refused(config, path)
    _check_expert_parallel(config["expert_parallel"], path)
    _check_grad_accum(config, path)
    _check_schedule(config.get("scheduler"), Strategy.of(config), path)


def _check_expert_parallel(section: dict[str, Any], path: Path) -> None:
    defaults = vars(AutoEPConfig())
    for key, value in section.items():
        if key in READ or value == defaults.get(key) or (key, value) in ALIKE:
            continue
        reason = (
            f"{OF_THE_MODEL[key]} of the model's config.json is what counts"
            if key in OF_THE_MODEL
            else "it is for other models, or for AutoEP's own layer, in whose place this system's stands"
        )
        raise UserError(f"{path}: expert_parallel.{key} must be left out, not {shown(value)}: {reason}")


def _check_grad_accum(config: dict[str, Any], path: Path) -> None:
    wanted = lookup(config, "data_types.grad_accum_dtype")
    if wanted is None:
        return
    try:
        DtypeEnum(wanted)
    except ValueError:
        known = ", ".join(f'"{each.name}"' for each in DtypeEnum)
        raise UserError(f"{path}: data_types.grad_accum_dtype must be one of {known}, not {shown(wanted)}") from None


def check_optimizer_values(kind: str, takes: type, params: Mapping[str, Any], path: Path) -> None:
    """`takes`: a class of torch.optim that checks what it is given, or of DeepSpeed, which does not and may need a compiler."""
    _check_kinds("optimizer.params", takes, params, path)
    for name in SWITCHES & params.keys():
        if not is_kind(params[name], SWITCH):
            raise UserError(f"{path}: optimizer.params.{name} must be {SWITCH}, not {shown(params[name])}")
    torchs = takes if takes.__module__.startswith("torch.optim") else torch.optim.AdamW
    accepted = inspect.signature(torchs).parameters
    try:
        torchs([torch.nn.Parameter(torch.zeros(1))], **{name: value for name, value in params.items() if name in accepted})
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"{path}: optimizer.params: {kind} refuses them: {sentence(error)}") from error


def _check_schedule(section: Any, chosen: Strategy, path: Path) -> None:
    if not isinstance(section, dict):
        return
    kind, params = str(section["type"]), section.get("params") or {}
    if schedules.is_torchs(kind) and (chosen.zero_stage or chosen.dtype != "float32"):
        raise UserError(
            f"{path}: scheduler.type {kind} is PyTorch's, which takes no optimizer that is wrapped for ZeRO or half precision; "
            f"take one of {', '.join(schedules.NAMES)}, or zero_optimization.stage 0 in fp32"
        )
    takes: Any = schedules.find(kind)  # `keys.py` has found it
    _check_kinds("scheduler.params", takes, params, path)
    if params.get("warmup_type", WARMUP_TYPES[0]) not in WARMUP_TYPES:
        raise UserError(f"{path}: scheduler.params.warmup_type must be one of {WARMUP_TYPES}, not {shown(params['warmup_type'])}")
    if params.get("total_num_steps", 1) < 1:
        raise UserError(f"{path}: scheduler.params.total_num_steps must be at least 1, not {params['total_num_steps']}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, momentum=0.9)
    try:
        with warnings.catch_warnings(action="ignore"):
            schedule: LRScheduler = takes(optimizer, **params)
            schedule.step()
    except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{path}: scheduler.params: {kind} refuses them: {sentence(error)}") from error


def _check_kinds(where: str, takes: Any, params: Mapping[str, Any], path: Path) -> None:
    for name, parameter in inspect.signature(takes).parameters.items():
        is_default = name in params and params[name] is None and parameter.default is None
        if name in params and not is_default and (wanted := another_kind(params[name], _example(parameter))):
            raise UserError(f"{path}: {where}.{name} must be {wanted}, not {shown(params[name])}")


def _example(parameter: inspect.Parameter) -> Any:
    """The default or, where there is none, a value of the annotated type."""
    annotation = str(parameter.annotation)
    if parameter.default in (None, parameter.empty):
        return False if "bool" in annotation else 1 if annotation in ("<class 'int'>", "<class 'float'>") else None
    return parameter.default
