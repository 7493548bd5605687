"""What training says at its start: the plan's memory beside the measured, and how long the run should take."""

from __future__ import annotations

from typing import Any

from launch.engine.strategy import settings_of_run
from launch.planning.devices import device_of
from launch.planning.job import Job, job_from
from launch.planning.memory import GB, plan_memory
from launch.planning.time import plan_time
from launch.words import duration
from model.sizes import ModelSizes


def job_of_run(config: dict[str, Any], ranks_per_node: int) -> Job:
    """From what a run's config.json holds."""
    return job_from(
        ModelSizes.of(config["model"]),
        settings_of_run(config),
        ranks=config["world_size"],
        ranks_per_node=ranks_per_node,
        sequence_length=config["sequence_length"],
        attention=config["arguments"].get("attn_implementation", "flash"),
    )


def memory_line(job: Job, measured: float, *, on_gpu: bool) -> str:
    """`measured`: bytes, of a GPU its allocator's peak in the rehearsal, of a CPU what the process grew by since before its engine,
    and so while the model was built too."""
    memory = plan_memory(job, on_gpu=on_gpu)
    planned = memory.live if on_gpu else memory.live + memory.build
    what = "allocated at most" if on_gpu else "the process grew by"
    return f"memory of a rank: {planned / GB:,.2f} GB of tensors by the plan, {what} {measured / GB:,.2f} GB in the rehearsal"


def duration_line(job: Job, device_name: str | None, steps: int, save_interval: int) -> str | None:
    """None for a device that the planner has no data of. `save_interval`: what a run that dies can lose is said as well."""
    device = device_of(device_name)
    if device is None or steps < 1:
        return None
    time = plan_time(job, device)
    whole, between = duration(steps * time.total), duration(save_interval * time.total)
    return (
        f"{steps:,} steps should take about {whole}, a checkpoint every {between} "
        f"(--save_interval {save_interval}): {time.tokens_per_second(job):,.0f} tokens/s, "
        f"MFU {time.mfu(job, device):.0%} by the plan for {device.name}; launch/plan.py says what it rests on"
    )


def beside_measured(job: Job, device_name: str | None, seconds: float) -> dict[str, Any] | None:
    """The plan of an optimizer step beside how long one took; None for a device that the planner has no data of."""
    device = device_of(device_name)
    if device is None:
        return None
    time = plan_time(job, device)
    ratio = seconds / time.total
    return {"device": device.name, "total_ms": 1e3 * time.total, "mfu": time.mfu(job, device), "measured_to_predicted": ratio}
