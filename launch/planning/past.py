"""`--from RUN`: the rest of a run, planned from what it really does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.cli import UserError, counted, sentence
from data.files import read_json
from launch.engine.kinds import OBJECT, WHOLE, is_kind
from launch.planning.answer import expense
from launch.planning.arguments import PlanArguments
from launch.planning.devices import find_device
from launch.planning.expectation import job_of_run
from launch.planning.memory import GB, plan_memory
from launch.planning.show import wrapped
from launch.planning.time import plan_time
from launch.reporting.columns import Columns
from launch.reporting.read import Collector
from launch.words import SECONDS_PER_DAY, duration
from model.accounting import count_parameters

#: Logged steps that the speed is the median of: the last ones, without the slow first.
RECENT = 50
#: What of config.json is needed.
KINDS = {"model": OBJECT, "deepspeed": OBJECT, "sequence_length": WHOLE, "world_size": WHOLE, "arguments": OBJECT}


def rest_of(arguments: PlanArguments) -> dict[str, Any]:
    """What is left of the run, and how long it takes at the speed it has. Raises `UserError` that names the folder."""
    assert arguments.from_run is not None
    config, steps = read(arguments.from_run)
    device = find_device(arguments.gpu) if arguments.gpu else None
    # config.json does not say how the ranks were spread: as many on a node as it has of these cards.
    in_node = min(config["world_size"], device.gpus_per_node) if device else config["world_size"]
    try:
        job = job_of_run(config, ranks_per_node=in_node)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--from {arguments.from_run}: config.json does not describe a run: {sentence(error)}") from None
    speed = float(np.median(steps.get("tokens_per_second")[-RECENT:]))
    done = {"steps": int(steps.steps[-1]), "tokens": int(steps.get("tokens")[-1])}
    # A run ends by its steps: those that a rollback took back are trained again, and their tokens count twice.
    by_steps = (config["arguments"]["max_steps"] - done["steps"]) * job.tokens_per_step
    left = max(0.0, arguments.tokens - done["tokens"] if arguments.tokens else by_steps)
    count = count_parameters(job.sizes)
    planned = plan_time(job, device) if device else None
    mfu = steps.get("mfu")[np.isfinite(steps.get("mfu"))].tolist()[-1:]  # of GPUs alone
    return {
        "run": str(arguments.from_run),
        "parameters": {"total": count.total, "active": count.active, "on_a_rank": job.local_parameters},
        "gpus": job.ranks,
        "sequence_length": job.sequence_length,
        "done": done,
        "left": {"steps": round(left / job.tokens_per_step), "tokens": left},
        "tokens_per_second": speed,
        "planned_tokens_per_second": planned.tokens_per_second(job) if planned else None,
        "mfu": mfu[0] if mfu else None,
        "memory_gb": plan_memory(job, on_gpu=device is not None or bool(mfu)).in_gb(),
        "device_memory_gb": device.memory / GB if device else None,
        **expense(job.ranks, left / speed, device, arguments.price),
    }


def read(folder: Path) -> tuple[dict[str, Any], Columns]:
    """Its config.json, and the logged steps that have a speed and a count of tokens, at least one."""
    if not (folder / "config.json").is_file():
        raise UserError(f"--from {folder}: there is no config.json, so no run; name a folder that launch/train.py wrote")
    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        raise UserError(f"--from {folder}: config.json is damaged: {error}") from None
    missing = [key for key in KINDS if key not in config]
    if missing:
        raise UserError(f"--from {folder}: config.json has no {missing[0]!r}; name a folder that launch/train.py wrote")
    wrong = [key for key, kind in KINDS.items() if not is_kind(config[key], kind) or (kind == WHOLE and config[key] < 1)]
    if not wrong and not is_kind(config["arguments"].get("max_steps"), WHOLE):
        wrong = ["arguments.max_steps"]
    if wrong:
        raise UserError(f"--from {folder}: config.json has no usable {wrong[0]!r}; it is not as launch/train.py wrote it")
    collector = Collector()
    if (folder / "metrics.jsonl").is_file():
        collector.take(folder / "metrics.jsonl")
    steps = collector.columns()
    timed = steps.where((steps.get("tokens_per_second") > 0) & np.isfinite(steps.get("tokens")))
    if not len(timed):
        raise UserError(f"--from {folder}: metrics.jsonl has no logged step yet; plan with --gpu until it has one")
    return config, timed


def show_rest(answer: dict[str, Any]) -> str:
    """In words."""
    done = answer["done"]
    lines = [
        f"{answer['run']}: {done['tokens']:,} tokens in {done['steps']:,} steps on {counted(answer['gpus'], 'rank')}, "
        f"{answer['tokens_per_second']:,.0f} tokens/s now",
        _left(answer),
    ]
    if answer["planned_tokens_per_second"]:
        planned = answer["planned_tokens_per_second"]
        reached = answer["tokens_per_second"] / planned
        lines.append(f"the plan for this card says {planned:,.0f} tokens/s; the run does {reached:.0%} of that")
    lines.append(f"memory of a rank by the plan: {answer['memory_gb']['total']:.2f} GB")
    return "\n".join(map(wrapped, lines))


def _left(answer: dict[str, Any]) -> str:
    left = answer["left"]
    if not left["tokens"]:
        return "nothing is left, the run is through; --tokens plans beyond its end"
    cost = "" if answer["cost"] is None else f", cost {answer['cost']:,.0f}"
    return (
        f"left: {left['tokens']:,.0f} tokens, {left['steps']:,} steps, {duration(answer['days'] * SECONDS_PER_DAY)}, "
        f"{answer['gpu_hours']:,.1f} GPU hours{cost}"
    )
