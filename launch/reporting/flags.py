"""Red flags: what a person should look at, in words, with numbers and with what to do. A pure function of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from data.cli import counted
from launch.reporting.checks import LEAST_ROWS, LEVELS, Flag, last_part, some_steps, window_medians
from launch.reporting.experts import collapsed_experts, logits_grow
from launch.reporting.learning import always_clipped, high_norm, loss_rises, not_finite, validation_apart
from launch.reporting.read import Run

SLOWER = 0.8  # of the best sustained throughput
LONG_WAIT = 0.1  # of a step's time
MANY_SKIPPED, SOME_SKIPPED = 0.05, 0.002  # share of all steps


def slows_down(run: Run) -> Iterator[Flag]:
    medians = window_medians(run.train.get("tokens_per_second"))
    if not len(medians):
        return
    best, now = float(np.sort(medians)[-3]), float(medians[-2:].max())  # third best: two lucky windows are no standard
    if now < SLOWER * best:
        yield Flag(
            level="look",
            title="Training slows down",
            detail=f"{now:,.0f} tokens/s lately, {best:,.0f} at its best ({now / best:.0%}).",
            advice="Look at the wait for data, at load imbalance (the busiest rank sets the pace), at other processes on the "
            "machine, and at device clocks and temperature (nvidia-smi -q -d CLOCK,TEMPERATURE).",
        )


def waits_for_data(run: Run) -> Iterator[Flag]:
    waited, step = last_part(run.train.get("data_seconds")), last_part(run.train.get("step_seconds"))
    known = np.isfinite(waited) & np.isfinite(step) & (step > 0)
    if len(run.train) < LEAST_ROWS or not known.any():
        return
    share = float(waited[known].sum() / step[known].sum())
    if share > LONG_WAIT:
        yield Flag(
            level="look",
            title="Training waits for data",
            detail=f"{share:.0%} of a step's time lately, on the rank that waits longest.",
            advice="Put the shards on a local disk, leave processors free for the loading thread, and look whether another program "
            "reads from the same disk.",
        )


def skipped_steps(run: Run) -> Iterator[Flag]:
    steps = sorted({mark.step for mark in run.marks if mark.kind == "skipped"})
    if not steps:
        return
    share = len(steps) / max(1, run.last_step)
    rolled = sum(mark.kind == "rollback" for mark in run.marks)
    back = f" The run went back to a checkpoint {counted(rolled, 'time')}." if rolled else ""
    yield Flag(
        level="bad" if share > MANY_SKIPPED else "look" if share > SOME_SKIPPED or rolled else "note",
        title=f"{counted(len(steps), 'spike')} skipped",
        detail=f"Steps whose loss or norm was far out were not taken: {some_steps(steps)} ({share:.2%} of the run).{back}",
        advice="Single ones are what the guard is for. Many, or more and more: lower the learning rate, or read their samples "
        "(skipped_samples in metrics.jsonl) for broken documents.",
    )


def failed_saves(run: Run) -> Iterator[Flag]:
    failed = [mark for mark in run.marks if mark.kind == "save_failed"]
    if failed:
        later = any(mark.kind == "checkpoint" and mark.step > failed[-1].step for mark in run.marks)
        yield Flag(
            level="note" if later else "bad",
            title="A checkpoint could not be saved",
            detail=f"At step {some_steps([mark.step for mark in failed])}; the last time: {failed[-1].text}.",
            advice="A later one was saved." if later else "Free space on the disk now: the second failure in a row ends the run.",
        )


def damaged_lines(run: Run) -> Iterator[Flag]:
    if run.damaged:
        yield Flag(
            level="note",
            title="Lines that could not be read",
            detail=f"{run.damaged} lines of metrics.jsonl are no JSON objects with a step, and are left out here.",
            advice="One half line at the end is what a killed run leaves. More: a full disk, or another program's output.",
        )


CHECKS: tuple[Callable[[Run], Iterator[Flag]], ...] = (
    not_finite, loss_rises, high_norm, always_clipped, validation_apart, collapsed_experts, logits_grow, slows_down, waits_for_data,
    skipped_steps, failed_saves, damaged_lines,
)  # fmt: skip


def flags_of(run: Run) -> list[Flag]:
    """The worst first."""
    found = [flag for check in CHECKS for flag in check(run)]
    return sorted(found, key=lambda flag: LEVELS.index(flag.level))
