"""Another number of ranks, EP size, ZeRO stage or dtype: a checkpoint becomes DeepSpeed's universal one, and is loaded as such.

A universal checkpoint holds every parameter and its Adam moments whole (all experts, in numeric order), one file each:
`zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt`. `deepspeed.checkpoint.ds_to_universal` makes it from ZeRO 1, 2 and 3;
what it leaves out (ZeRO 0 as source and target, ZeRO 3 together with any other stage, Muon) is added here. Muon's momentum
of a matrix is `momentum/<parameter>.pt`: DeepSpeed's loader would lay it out as it does Adam's moments, which is wrong.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import Tensor

from data.cli import UserError
from data.files import make_folder
from launch.checkpoint.buffers import BUFFERS
from launch.checkpoint.converter import run_converter
from launch.checkpoint.finite import check_finite
from launch.checkpoint.publish import publish, working_name
from launch.checkpoint.state import STATE, SavedState, read_state
from launch.checkpoint.unpickle import expecting_sense, hearing_of_loads, load_file, save_stages_by_value
from launch.checkpoint.weights import (
    EXPERT_WEIGHT,
    MODEL_STATES,
    MOMENTUM,
    check_master,
    module_weights,
    numbered,
    optimizer_shards,
    whole_momenta,
)
from launch.engine.settings import counting, give_own_steps
from launch.manifest import FileRecord, find_manifest, first_damage, read_manifest, record_all, write_manifest

MOMENTS = ("exp_avg", "exp_avg_sq")
#: More parameter groups than an optimizer of ours has; DeepSpeed pairs them by position and stops at the shorter list.
GROUPS = 64
#: A model-states file as ZeRO 0 to 2 name it, and as ZeRO 3 does.
MODEL_STATES_NAMES = (MODEL_STATES, "zero_pp_rank_0_mp_rank_00_model_states.pt")


def optimizer_facts(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What a conversion needs to know beforehand: the learning rate, what the optimizer keeps, and without ZeRO the order of
    the parameters."""
    held = {k for state in engine.optimizer.state.values() for k, v in state.items() if isinstance(v, Tensor) and v.ndim}
    rates = {bool(group.get("use_muon")): group["lr"] for group in engine.optimizer.param_groups}
    facts: dict[str, Any] = {"lr": rates[False], "state": sorted(held)}
    if True in rates:
        facts["offloaded"] = bool(getattr(engine.optimizer, "cpu_offload", False))
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():
        facts["parameters"] = [engine.param_names[p] for g in engine.optimizer.param_groups for p in g["params"]]
    return facts


def check_convertible(path: Path, saved: dict[str, Any], wanted: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises UserError where a checkpoint of layout `saved` cannot become one of layout `wanted`."""
    if saved == wanted:
        return
    was = ", ".join(f"{k} {v}" for k, v in saved.items())
    if set(facts["state"]) - {MOMENTUM} != set(MOMENTS):
        raise UserError(
            f"{path} holds an optimizer state ({', '.join(facts['state']) or 'none'}) that only resumes in the layout it was "
            f"saved in ({was}); only Adam's moments and Muon's momentum convert"
        )
    stages = {saved["zero_stage"], wanted["zero_stage"]}
    if MOMENTUM in facts["state"] and (not stages <= {1, 2} or facts.get("offloaded")):
        raise UserError(
            f"{path} holds Muon's momentum, which converts between ZeRO 1 and 2 without offload_optimizer; this one resumes in the "
            f"layout it was saved in ({was}) alone"
        )
    for layout in (saved, wanted):
        if layout["zero_stage"] == 0 and layout["dtype"] != "float32":
            raise UserError(
                f"{path} is ZeRO {saved['zero_stage']} in {saved['dtype']}, this run ZeRO {wanted['zero_stage']} in "
                f"{wanted['dtype']}: ZeRO 0 converts in float32 only; use zero_optimization.stage 1 or 2"
            )
    if saved["zero_stage"] == 0 and "parameters" not in facts:
        raise UserError(
            f"{path / STATE} has no optimizer.parameters, the order in which ZeRO 0 saved the optimizer's state: it was changed "
            f"since; restore the checkpoint, or resume it in the layout it was saved in ({was})"
        )


def convert(source: Path, folder: Path, *, on_phase: Callable[[str], None] = lambda _: None) -> None:
    """Make the universal checkpoint `folder` from the verified checkpoint `source`, unless it is there and whole.

    One process calls; it appears complete under its name or not at all. Needs about twice the disk space of `source`, four
    times where it holds Muon's momentum.
    Raises UserError where the disk is too full, or with the last words of DeepSpeed's converter.
    """
    source, folder = source.absolute(), folder.absolute()
    files: dict[str, FileRecord] = read_manifest(source)["files"]
    made_from = files[STATE]["xxh3_128"]
    tick = partial(on_phase, "converting a checkpoint")
    if _is_whole(folder, made_from, tick):
        return
    saved = read_state(source)
    make_folder(folder.parent)  # a run that begins at another's checkpoint has saved nothing yet
    # Of Muon's groups the converter first writes moments of zeros.
    times = 4 if MOMENTUM in saved.optimizer["state"] else 2
    needed, free = times * sum(f["bytes"] for f in files.values()), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(f"converting {source} needs {needed / 1e9:,.3f} GB, {folder.parent} has {free / 1e9:,.3f} GB free")
    temporary = working_name(folder, "tmp")
    try:
        with hearing_of_loads(tick):
            check_source(source)
            with expecting_sense(source):
                _convert(source, temporary, saved, tick)
        write_manifest(temporary, record_all(temporary, tick), made_from=made_from)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish(temporary, folder)


def _convert(source: Path, temporary: Path, saved: SavedState, tick: Callable[[], object]) -> None:
    """The files of the universal checkpoint."""
    if saved.identity.zero_stage == 0:
        _gather_unsharded(source, temporary, saved.optimizer["parameters"], tick)
    else:
        run_converter(source, temporary, tick)
    muons = _rates(source) if MOMENTUM in saved.optimizer["state"] else {}
    _complete(temporary, muons.get(False, saved.optimizer["lr"]))
    if saved.identity.zero_stage in (1, 2):
        for name, weight in module_weights(source):
            check_master(load_file(temporary / "zero" / name / "fp32.pt")["param"], weight, source, name)
    if muons:
        _put_momenta(source, temporary, muons[True], tick)


def check_source(source: Path) -> None:
    """Every file of the model and the optimizer holds tensors and nothing that runs, and finite numbers. Raises UserError."""
    models = [*numbered(source, "*_model_states.pt"), source / BUFFERS]
    shapes: list[list[dict[str, Any]] | None] = []
    for path in models:
        content = load_file(path)
        check_finite(content, path)
        if isinstance(content, dict) and content.get("param_shapes"):
            shapes.append(content["param_shapes"])
    for number, path in enumerate(numbered(source, "*_optim_states.pt")):
        # ZeRO 3 has a model's file for each rank; the other stages have one, and need no shapes.
        check_finite(load_file(path), path, shapes=shapes[min(number, len(shapes) - 1)] if shapes else None)


def _is_whole(folder: Path, made_from: str, on_read: Callable[[], object] = lambda: None) -> bool:
    manifest, _ = find_manifest(folder)
    if manifest is None or manifest.get("made_from") != made_from:
        return False
    return not first_damage(folder, manifest["files"], manifest["files"], on_read)


def _gather_unsharded(source: Path, temporary: Path, names: list[str], tick: Callable[[], object]) -> None:
    """ZeRO 0: each EP rank has saved a whole optimizer, its experts in it."""
    saved = [load_file(p)["optimizer"] for p in numbered(source, "expp_rank_*_optim_states.pt")]
    shards = [optimizer["state"] for optimizer in saved]
    number = {name: i for i, name in enumerate(names)}
    found = set[str]()
    for name, weight in module_weights(source):
        if name not in number:  # tied: the optimizer knows it by its first name
            continue
        found.add(name)
        states = [shard.get(number[name], {}) for shard in (shards if EXPERT_WEIGHT.search(name) else shards[:1])]
        _save_whole(temporary, name, "fp32", weight)
        for key in MOMENTS:
            held = [state.get(key) for state in states]
            _save_whole(temporary, name, key, torch.zeros_like(weight) if None in held else torch.cat(held))
        _save(temporary / "zero" / name / "step.pt", states[0].get("step", torch.tensor(0.0)))
        tick()
    if len(names) != sum(len(group["params"]) for group in saved[0]["param_groups"]) or found != number.keys():
        raise UserError(
            f"{source / STATE}: optimizer.parameters does not name the weights that the optimizer has; restore the checkpoint, or "
            "resume it in the layout it was saved in"
        )
    shutil.copy2(source / MODEL_STATES, temporary)


def _save_whole(temporary: Path, name: str, key: str, value: Tensor) -> None:
    body: dict[str, Any] = {"param": value.float().clone(), "cat_dim": 0}
    if EXPERT_WEIGHT.search(name):
        body.update(is_expert_param=True, ep_num_experts=value.shape[0])
    _save(temporary / "zero" / name / f"{key}.pt", body)


def _save(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def _complete(temporary: Path, lr: float) -> None:
    """Add what DeepSpeed's readers of the other ZeRO stages look for, so that one conversion serves every target."""
    there = next(temporary / name for name in MODEL_STATES_NAMES if (temporary / name).exists())
    for name in MODEL_STATES_NAMES:
        if not (temporary / name).exists():
            link_or_copy(there, temporary / name)
    zero = temporary / "zero"
    _give_shapes(zero, {name: shape for group in load_file(there)["param_shapes"] or [] for name, shape in group.items()})
    common = zero / "optimizer_state.pt"
    theirs = load_file(common, mmap=False) if common.exists() else {}
    steps = [load_file(p, mmap=False) for p in zero.glob("*/step.pt")]
    step = steps[0] if steps else theirs["optimizer_state_dict"]["state"][0]["step"]  # ZeRO 3 keeps it here alone
    assert all(torch.as_tensor(s) == step for s in steps), "parameters of different optimizer steps"
    for parameter in (p for p in zero.iterdir() if (p / "exp_avg.pt").exists() and not (p / "step.pt").exists()):
        torch.save(step, parameter / "step.pt")
    rates = [{"lr": lr}] * GROUPS  # everything else in a group is this run's own: see `load`
    stage3 = {"state": {0: {"step": step}}, "param_groups": rates}
    save_stages_by_value()
    torch.save({"ds_version": deepspeed.__version__, "param_groups": rates, "optimizer_state_dict": stage3}, common)


def link_or_copy(file: Path, name: Path) -> None:
    """Not every file system has hard links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def _rates(source: Path) -> dict[bool, float]:
    """The learning rates of Muon's groups (True) and of its Adam's, of the optimizer's file: what was saved before these converted
    names the first group's alone."""
    shard = load_file(optimizer_shards(source)[0])
    groups = shard["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    return {bool(group["use_muon"]): float(group["lr"]) for group in groups}


def _put_momenta(source: Path, temporary: Path, rate: float, tick: Callable[[], object]) -> None:
    """Muon's momentum of each matrix in the place of the zeros that `give_moments` gave, and the rate that goes with it."""
    folder = temporary / "momentum"
    for name, momentum in whole_momenta(source):
        _save(folder / f"{name}.pt", momentum.float().clone())
        for moment in MOMENTS:
            (temporary / "zero" / name / f"{moment}.pt").unlink()
        tick()
    _save(folder / "lr.pt", rate)


def _give_shapes(zero: Path, shapes: dict[str, Any]) -> None:
    """From ZeRO 3 the converter leaves bare flat tensors; the other stages read a dict with the parameter in its shape."""
    for name, shape in shapes.items():
        for key in ("fp32", *MOMENTS):
            path = zero / name / f"{key}.pt"
            value = load_file(path, mmap=False)
            if isinstance(value, Tensor):
                torch.save({"param": value.view(tuple(shape)), "cat_dim": 0}, path)


def load(engine: DeepSpeedEngine, folder: Path, *, together: Callable[[Callable[[], None]], object] = lambda read: read()) -> None:
    """Restore parameters, moments, schedule and counters; the buffers are the caller's. `load_universal` must be on.

    `together`: runs the reading of the fragments on all ranks, which raise alike.
    Each parameter group keeps this run's own hyperparameters but for the learning rate. DeepSpeed takes them from the
    checkpoint by position: a name with the checkpoint's EP size in it, and under ZeRO 3 the first group's weight decay for all.
    """
    own = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in engine.optimizer.param_groups]
    if engine.zero_optimization_stage() == 0:
        engine._load_checkpoint(str(folder), ".", load_optimizer_states=False)  # schedule and counters
        _load_unsharded(engine, folder / "zero")
    else:
        with _fragments_read(engine.optimizer, folder, together):
            engine.load_checkpoint(str(folder), tag=".")
        if any(group.get("use_muon") for group in own):
            _lay_out_momenta(engine, folder / "momentum")
    for group, mine in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(mine)
    give_own_steps(counting(engine.optimizer))


@contextmanager
def _fragments_read(optimizer: Any, folder: Path, together: Callable[[Callable[[], None]], object]) -> Iterator[None]:
    """DeepSpeed's optimizers read each rank's fragments in one method, past any checkpoint engine, and gather the weights right
    after it: where a rank has failed by then, the others would wait for it."""
    theirs = optimizer._load_universal_checkpoint

    def read(*arguments: Any) -> None:
        with expecting_sense(folder):
            theirs(*arguments)

    optimizer._load_universal_checkpoint = lambda *arguments: together(partial(read, *arguments))
    try:
        yield
    finally:
        del optimizer._load_universal_checkpoint


def _lay_out_momenta(engine: DeepSpeedEngine, folder: Path) -> None:
    """Into the state of each of Muon's partitions, as ZeRO 1 and 2 keep it there: whole matrices, see `whole_momenta`. DeepSpeed
    gives it the gradients' dtype at the first step."""
    zero = engine.optimizer
    rate = load_file(folder / "lr.pt", mmap=False)
    for group, matrices in zip(zero.optimizer.param_groups, zero.params_in_partition, strict=True):
        if not group.get("use_muon"):
            continue
        (flat,) = group["params"]
        parts = [_own_experts(n := zero.param_names[p], p, load_file(folder / f"{n}.pt")).flatten() for p in matrices]
        if parts:  # a partition may lie past the last matrix
            zero.optimizer.state[flat] = {MOMENTUM: torch.cat(parts).to(flat.device)}  # and no step, which is Adam's
        group["lr"] = rate


def _own_experts(name: str, parameter: Any, whole: Tensor) -> Tensor:
    """Of a tensor of all experts those that this rank computes; any other as it is."""
    if not EXPERT_WEIGHT.search(name):
        return whole
    first = groups._get_expert_parallel_rank(parameter.group_name) * parameter.shape[0]
    return whole[first : first + parameter.shape[0]]


@torch.no_grad()
def _load_unsharded(engine: DeepSpeedEngine, zero: Path) -> None:
    """ZeRO 0 in fp32: the parameters are the masters, the optimizer is torch's own."""
    for name, parameter in engine.module.named_parameters():
        state = engine.optimizer.state[parameter]
        for key in ("fp32", *MOMENTS):
            whole = load_file(zero / name / f"{key}.pt")["param"]
            value = _own_experts(name, parameter, whole).view_as(parameter).to(parameter.device)
            state[key] = parameter.copy_(value) if key == "fp32" else value.clone()
        del state["fp32"]
        state["step"] = torch.as_tensor(load_file(zero / name / "step.pt", mmap=False)).clone()
    lr = load_file(zero / "optimizer_state.pt", mmap=False)["param_groups"][0]["lr"]
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
