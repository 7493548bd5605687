"""Another number of ranks, EP size, ZeRO stage or dtype: a checkpoint becomes DeepSpeed's universal one, and is loaded as such.

A universal checkpoint holds every parameter and its Adam moments whole (all experts, in numeric order), one file each:
`zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt`. `deepspeed.checkpoint.ds_to_universal` makes it from ZeRO 1, 2 and 3;
what it leaves out (ZeRO 0 as source and target, ZeRO 3 together with any other stage) is added here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor

from launch import integrity
from launch.consolidate import EXPERT_WEIGHT, load_file, module_weights, numbered

MOMENTS = ("exp_avg", "exp_avg_sq")
#: More parameter groups than an optimizer of ours has; DeepSpeed pairs them by position and stops at the shorter list.
GROUPS = 64
REPOSITORY = Path(__file__).resolve().parents[1]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: A model-states file as ZeRO 0 to 2 name it, and as ZeRO 3 does.
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def state_bytes(engine: Any) -> int:
    """An upper estimate of what this rank writes: its optimizer shard, and the module as if no other rank had a copy."""
    optimizer = engine.optimizer
    held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    held += [p for group in optimizer.param_groups for p in group["params"]]
    held += list(engine.module.parameters())
    return sum(t.numel() * t.element_size() for t in held)


def optimizer_facts(engine: Any) -> dict[str, Any]:
    """What a conversion needs to know beforehand: the learning rate, what the optimizer keeps, and without ZeRO the order of
    the parameters."""
    held = {k for state in engine.optimizer.state.values() for k, v in state.items() if isinstance(v, Tensor) and v.ndim}
    facts: dict[str, Any] = {"lr": engine.get_lr()[0], "state": sorted(held)}
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():
        facts["parameters"] = [engine.param_names[p] for g in engine.optimizer.param_groups for p in g["params"]]
    return facts


def check_convertible(path: Path, saved: dict[str, Any], wanted: dict[str, Any], facts: dict[str, Any]) -> None:
    """Errors: `ValueError` where a checkpoint of layout `saved` cannot become one of layout `wanted`."""
    if saved == wanted:
        return
    if facts["state"] != sorted(MOMENTS):
        raise ValueError(
            f"{path} holds an optimizer state ({', '.join(facts['state']) or 'none'}) that only resumes in the layout it was "
            f"saved in ({', '.join(f'{k} {v}' for k, v in saved.items())}); only Adam's moments convert"
        )
    for layout in (saved, wanted):
        if layout["zero_stage"] == 0 and layout["dtype"] != "float32":
            raise ValueError(
                f"{path} is ZeRO {saved['zero_stage']} in {saved['dtype']}, this run ZeRO {wanted['zero_stage']} in "
                f"{wanted['dtype']}: ZeRO 0 converts in float32 only; use zero_optimization.stage 1 or 2"
            )


# ---------------------------------------------------------------------- convert


def convert(source: Path, folder: Path, *, on_phase: Callable[[str], None] = lambda _: None) -> None:
    """Make the universal checkpoint `folder` from the verified checkpoint `source`, unless it is there and whole.

    One process calls; it appears complete under its name or not at all. Needs about twice the disk space of `source`.
    Errors: `ValueError` where the disk is too full, or with the last words of DeepSpeed's converter.
    """
    source, folder = source.absolute(), folder.absolute()
    files = integrity.read_manifest(source)["files"]
    made_from = files["state.json"]["xxh3_128"]
    if _is_whole(folder, made_from):
        return
    needed, free = 2 * sum(f["bytes"] for f in files.values()), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise ValueError(f"converting {source} needs {needed / 1e9:,.3f} GB, {folder.parent} has {free / 1e9:,.3f} GB free")
    state = json.loads((source / "state.json").read_bytes())
    temporary = integrity.working_name(folder, "tmp")
    try:
        if state["identity"]["zero_stage"] == 0:
            _gather_unsharded(source, temporary, state["optimizer"]["parameters"])
        else:
            _run_converter(source, temporary, on_phase)
        _complete(temporary, state["optimizer"]["lr"])
    except (ValueError, OSError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    records = {str(p.relative_to(temporary)): integrity.record_file(p) for p in temporary.rglob("*") if p.is_file()}
    integrity.write_manifest(temporary, records, made_from=made_from)
    integrity.publish(temporary, folder)


def _is_whole(folder: Path, made_from: str) -> bool:
    manifest, damage = integrity.attempt(lambda: integrity.read_manifest(folder))
    if manifest is None or damage or manifest.get("made_from") != made_from:
        return False
    return not integrity.attempt(lambda: integrity.check_files(folder, manifest["files"], manifest["files"]))[1]


def _run_converter(source: Path, temporary: Path, on_phase: Callable[[str], None]) -> None:
    """DeepSpeed's converter in a process of its own: it forks workers, which a process with GPUs and threads must not."""
    command = [sys.executable, "-m", "launch.universal", str(source), str(temporary)]
    # None of the launcher's variables: the child is no rank of the run.
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, text=True, start_new_session=True, **pipes)
    said: list[str] = []
    for line in process.stdout:  # type: ignore[union-attr]
        said.append(line)
        on_phase("converting a checkpoint")
    if process.wait():
        raise ValueError(f"{source} could not be converted: {' '.join(' '.join(said).split())[-400:]}")
    (temporary.parent / "latest_universal").unlink(missing_ok=True)  # DeepSpeed's pointer; it names the temporary folder


def _converter_process(source: str, temporary: str) -> None:
    """What `_run_converter` starts. It and its workers end when the process that started it does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = ["ds_to_universal", "--input_folder", source, "--output_folder", temporary]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def _end_with_parent() -> None:
    # The parent holds the other end and writes nothing. Not `sys.stdin`: its lock would be held when workers are forked.
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _gather_unsharded(source: Path, temporary: Path, names: list[str]) -> None:
    """ZeRO 0: each EP rank has saved a whole optimizer, its experts in it."""
    shards = [load_file(p)["optimizer"]["state"] for p in numbered(source, "expp_rank_*_optim_states.pt")]
    number = {name: i for i, name in enumerate(names)}
    for name, weight in module_weights(source):
        states = [shard.get(number[name], {}) for shard in (shards if EXPERT_WEIGHT.search(name) else shards[:1])]
        _save_whole(temporary, name, "fp32", weight)
        for key in MOMENTS:
            held = [state.get(key) for state in states]
            _save_whole(temporary, name, key, torch.zeros_like(weight) if None in held else torch.cat(held))
        _save(temporary / "zero" / name / "step.pt", states[0].get("step", torch.tensor(0.0)))
    shutil.copy2(source / MODEL_STATES[0], temporary)


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
    there = next(temporary / name for name in MODEL_STATES if (temporary / name).exists())
    for name in MODEL_STATES:
        if not (temporary / name).exists():
            os.link(there, temporary / name)
    zero = temporary / "zero"
    _give_shapes(zero, {name: shape for group in load_file(there)["param_shapes"] or [] for name, shape in group.items()})
    common = zero / "optimizer_state.pt"
    theirs = torch.load(common, map_location="cpu", weights_only=False) if common.exists() else {}
    steps = [torch.load(p, weights_only=True) for p in zero.glob("*/step.pt")]
    step = steps[0] if steps else theirs["optimizer_state_dict"]["state"][0]["step"]  # ZeRO 3 keeps it here alone
    assert all(torch.as_tensor(s) == step for s in steps), "parameters of different optimizer steps"
    for parameter in (p for p in zero.iterdir() if (p / "exp_avg.pt").exists() and not (p / "step.pt").exists()):
        torch.save(step, parameter / "step.pt")
    groups = [{"lr": lr}] * GROUPS  # everything else in a group is this run's own: see `load`
    stage3 = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save({"ds_version": deepspeed.__version__, "param_groups": groups, "optimizer_state_dict": stage3}, common)


def _give_shapes(zero: Path, shapes: dict[str, Any]) -> None:
    """From ZeRO 3 the converter leaves bare flat tensors; the other stages read a dict with the parameter in its shape."""
    for name, shape in shapes.items():
        for key in ("fp32", *MOMENTS):
            path = zero / name / f"{key}.pt"
            value = torch.load(path, map_location="cpu", weights_only=False)
            if isinstance(value, Tensor):
                torch.save({"param": value.view(tuple(shape)), "cat_dim": 0}, path)


# ---------------------------------------------------------------------- load


def load(engine: Any, folder: Path) -> None:
    """Restore parameters, moments, schedule and counters; the buffers are the caller's. `load_universal` must be on.

    Each parameter group keeps this run's own hyperparameters but for the learning rate. DeepSpeed takes them from the
    checkpoint by position: a name with the checkpoint's EP size in it, and under ZeRO 3 the first group's weight decay for all.
    """
    own = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in engine.optimizer.param_groups]
    if engine.zero_optimization_stage() == 0:
        engine._load_checkpoint(str(folder), ".", load_optimizer_states=False)  # schedule and counters
        _load_unsharded(engine, folder / "zero")
    else:
        engine.load_checkpoint(str(folder), tag=".")
    for group, mine in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(mine)


@torch.no_grad()
def _load_unsharded(engine: Any, zero: Path) -> None:
    """ZeRO 0 in fp32: the parameters are the masters, the optimizer is torch's own."""
    from deepspeed.utils import groups

    for name, parameter in engine.module.named_parameters():
        state = engine.optimizer.state[parameter]
        for key in ("fp32", *MOMENTS):
            whole = torch.load(zero / name / f"{key}.pt", map_location="cpu", weights_only=False)["param"]
            if EXPERT_WEIGHT.search(name):
                rank = groups._get_expert_parallel_rank(parameter.group_name)
                whole = whole[rank * parameter.shape[0] : (rank + 1) * parameter.shape[0]]
            value = whole.view_as(parameter).to(parameter.device)
            state[key] = parameter.copy_(value) if key == "fp32" else value.clone()
        del state["fp32"]
        state["step"] = torch.as_tensor(torch.load(zero / name / "step.pt", weights_only=False)).clone()
    lr = torch.load(zero / "optimizer_state.pt", weights_only=False)["param_groups"][0]["lr"]
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


if __name__ == "__main__":
    _converter_process(*sys.argv[1:])
