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
    )


def memory_line(job: Job, measured: float, *, on_gpu: bool) -> str:
    """`measured`: bytes, of a GPU its allocator's peak in the rehearsal, of a CPU what the process grew by since before its engine,
    and so while the model was built too."""
    memory = plan_memory(job, on_gpu=on_gpu)
    planned = memory.live if on_gpu else memory.live + memory.build
    what = "allocated at most" if on_gpu else "the process grew by"
    return f"memory of a rank: {planned / GB:,.2f} GB of tensors by the plan, {what} {measured / GB:,.2f} GB in the rehearsal"


def duration_line(job: Job, device_name: str | None, steps: range, *, save_interval: int, eval_interval: int = 0) -> str | None:
    """None for a device that the planner has no data of. What a run that dies can lose is said as well: `steps` are those that are
    left, the last of which is saved; `eval_interval` is 0 where nothing is evaluated on."""
    device = device_of(device_name)
    if device is None or not steps:
        return None
    time = plan_time(job, device)

    def every(interval: int) -> str | None:
        """None where no multiple comes before the end."""
        is_before = (steps.stop - 1) // interval > steps.start // interval
        return duration(interval * time.total) if is_before else None

    saved = []
    if between := every(save_interval):
        saved.append(f"every {between} (--save_interval {save_interval})")
    if eval_interval and (between := every(eval_interval)):
        saved.append(f"at a new best validation loss, looked for every {between} (--eval_interval {eval_interval})")
    return (
        f"{len(steps):,} steps should take about {duration(len(steps) * time.total)}, evaluations and saves aside, a checkpoint "
        f"{' and '.join(saved) or f'at the end alone (--save_interval {save_interval})'}: "
        f"{time.tokens_per_second(job):,.0f} tokens/s, MFU {time.mfu(job, device):.0%} by the plan for {device.name}; "
        "launch/plan.py says what it rests on"
    )


def beside_measured(job: Job, device_name: str | None, seconds: float) -> dict[str, Any] | None:
    """The plan of an optimizer step beside how long one took; None for a device that the planner has no data of."""
    device = device_of(device_name)
    if device is None:
        return None
    time = plan_time(job, device)
    ratio = seconds / time.total
    return {"device": device.name, "total_ms": 1e3 * time.total, "mfu": time.mfu(job, device), "measured_to_predicted": ratio}
