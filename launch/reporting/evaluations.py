"""Evaluations of exported models and what they wrote: the JSON of `launch/evaluate.py --output`, and the samples beside it."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.cli import UserError
from data.files import read_object
from launch.reporting.checks import is_finite
from launch.reporting.columns import Row, to_number
from launch.reporting.read import Run

PASS = re.compile(r"pass@\d+$")
SHOWN = ("loss", "perplexity", "bits_per_byte")
GENERATIONS = 8  # on the page, and so many characters of each
CHARACTERS = 1500


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model wrote for a problem. `passed` is None where it was not executed."""

    title: str
    text: str
    passed: bool | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    name: str
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %, of pass@k
    generations: list[Generation] = field(default_factory=list)


def evaluations_of(runs: Sequence[Run], named: Sequence[Path]) -> dict[str, list[Evaluation]]:
    """By the name of the run in whose folder each lies. `named` ones (`--evaluation`) that lie in none are those of the only run,
    or of `""`: which of several runs was exported nobody can tell. Raises `UserError` for a named one that is something else."""
    found = {run.name: find_evaluations(run.folder) for run in runs}
    shown = {path.resolve() for run in runs for path in _where_they_lie(run.folder)}
    for path in named:
        evaluation, whole = read_evaluation(path), path.resolve()
        if evaluation is None:
            raise UserError(f"--evaluation {path} is not a result of launch/evaluate.py --output")
        owners = [run.name for run in runs if len(runs) == 1 or whole.is_relative_to(run.folder.resolve())]
        if whole not in shown:
            found.setdefault(owners[0] if owners else "", []).append(evaluation)
        shown.add(whole)
    return found


def find_evaluations(folder: Path) -> list[Evaluation]:
    """In a run's folder and its `evaluations/`."""
    found = map(read_evaluation, _where_they_lie(folder))
    return [evaluation for evaluation in found if evaluation is not None]


def _where_they_lie(folder: Path) -> list[Path]:
    paths = sorted([*folder.glob("*.json"), *folder.glob("evaluations/*.json")])
    return [path for path in paths if path.name != "config.json"]


def read_evaluation(path: Path) -> Evaluation | None:
    """None where the file is something else."""
    content = read_object(path)
    figures = _figures(content)
    if not figures:
        return None
    intervals = {name: (low, high) for name in figures for low, high in _interval(content.get(f"{name}_interval"))}
    wrote = any(map(PASS.match, figures))  # the loss alone has no samples: those beside it are another evaluation's
    generations = generations_beside(path, content.get("results_file")) if wrote else []
    return Evaluation(name=path.name, figures=figures, intervals=intervals, generations=generations)


def _figures(content: Row) -> dict[str, float]:
    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    return {k: to_number(v) for k, v in content.items() if is_number(v) and (PASS.match(k) or k in SHOWN)}


def _interval(value: Any) -> list[tuple[float, float]]:
    """None or one: `[low, high]`."""
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_finite, value)):
        return []
    return [(to_number(value[0]), to_number(value[1]))]


def generations_beside(path: Path, results: Any = None) -> list[Generation]:
    """The first of `results` (the path that the evaluation notes; its folder may have moved), `NAME.samples.jsonl_results.jsonl`
    and the like: executed ones before those that were only written."""
    stem = glob.escape(path.name.removesuffix(".json"))
    files = [path.parent / Path(results).name] if isinstance(results, str) else []
    for pattern in (f"{stem}*_results.jsonl", f"{stem}*samples*.jsonl", "*samples*_results.jsonl", "*samples*.jsonl"):
        files += sorted(path.parent.glob(pattern))
    for file in filter(os.path.isfile, files):  # where `results` is no name of a file at all, as well
        found = read_generations(file)
        if found:
            return found
    return []


def read_generations(path: Path) -> list[Generation]:
    """One a problem, GENERATIONS in all, those that passed first: they say what the model can do."""
    first: dict[str, Generation] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            generation = to_generation(line)
            if generation and (generation.title not in first or (generation.passed and not first[generation.title].passed)):
                first[generation.title] = generation
    return sorted(first.values(), key=lambda generation: not generation.passed)[:GENERATIONS]


def to_generation(line: str) -> Generation | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # what a model writes may be nested as deep as it likes
        return None
    if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
        return None
    text = str(row.get("prompt") or "") + row["completion"]
    passed = row.get("passed")
    cut = text if len(text) <= CHARACTERS else text[:CHARACTERS] + "\n..."
    return Generation(title=str(row.get("task_id", "sample")), text=cut, passed=passed if isinstance(passed, bool) else None)
