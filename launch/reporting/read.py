"""A run's folder as columns: `metrics.jsonl` and `config.json`, read fast and whatever state a crash left them in.

A hundred thousand steps of 24 layers are a quarter of a gigabyte of text: lines become numpy columns by the block, so that the
text is never held as Python objects all at once.

Shapes: N logged steps, Y layers.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data.cli import UserError
from data.files import read_object
from launch.reporting.columns import Columns, Row, join, to_columns, to_table

MOST_STEPS = 1 << 53  # a browser's whole numbers
BLOCK = 4096  # lines that are held as Python objects at a time
#: Snapshots whose `expert_load` is kept, twice a map's columns: all 10,000 of a million steps of 60 layers took 7 GB.
MOST_TABLES = 640
NOT_FINITE = re.compile(r"\b(nan|inf|infinity)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at a step. `kind`: checkpoint, save_failed, skipped, restart, rollback."""

    kind: str
    step: int
    text: str


@dataclass(kw_only=True)
class Run:
    """All that a report says about a run."""

    name: str
    folder: Path
    config: dict[str, Any]
    train: Columns
    evaluations: list[Row] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    snapshots: list[Row] = field(default_factory=list)
    saves: list[Row] = field(default_factory=list)
    damaged: int = 0

    @property
    def last_step(self) -> int:
        """Of anything that was logged."""
        logged = [int(self.train.steps[-1])] if len(self.train) else []
        return max(logged + [int(row["step"]) for row in self.evaluations], default=0)


def read_run(folder: Path) -> Run:
    """Raises `UserError` where `folder` is not a run's."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        inside = " (its runs: " + ", ".join(p.parent.name for p in sorted(folder.glob("*/metrics.jsonl"))[:5]) + ")"
        hint = inside if any(folder.glob("*/metrics.jsonl")) else ""
        raise UserError(f"{folder} is not a run's folder: it has no metrics.jsonl{hint}; name the --output of launch/train.py")
    collector = Collector()
    collector.take_superseded(folder / "metrics.superseded.jsonl")
    collector.take(path)
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=read_object(folder / "config.json"),
        train=collector.columns(),
        evaluations=_last_of_each_step(collector.evaluations),
        marks=sorted(collector.marks, key=lambda mark: mark.step),
        snapshots=_merged_by_step(collector.snapshots),
        saves=_last_of_each_step(collector.saves),
        damaged=collector.damaged,
    )


def _last_of_each_step(rows: list[Row]) -> list[Row]:
    return [row for _, row in sorted({int(row["step"]): row for row in rows}.items())]


def _merged_by_step(rows: list[Row]) -> list[Row]:
    """The load map and the tasks of one step are rows of their own."""
    merged: dict[int, Row] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [row for _, row in sorted(merged.items())]


def drop_from(step: int, rows: list[Row]) -> None:
    """What was measured of weights that a restart or a rollback gave up; what happened stays told. `rows` rise by step."""
    while rows and rows[-1]["step"] >= step:
        rows.pop()


def parse(line: bytes) -> Row | None:
    """One line of the file; None where it is half a line or no object with a step. NaN, which is not JSON, is read as well."""
    try:
        row = orjson.loads(line)
    except ValueError:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and abs(step) <= MOST_STEPS else None


class Collector:
    """Sorts the lines of a `metrics.jsonl` by what they are."""

    def __init__(self) -> None:
        self.evaluations: list[Row] = []
        self.snapshots: list[Row] = []
        self.saves: list[Row] = []
        self.marks: list[Mark] = []
        self.damaged = 0
        self._blocks: list[Columns] = []
        self._tables, self._every = 0, 1  # snapshots with a table so far, of which every so many are kept
        self._passing: Row = {}  # the newest, where it is none of these: still as a list
        self._last: tuple[int, int] = (-1, -1)  # step and samples of the last training row

    def take(self, path: Path) -> None:
        with path.open("rb") as file:
            while lines := list(itertools.islice(file, BLOCK)):
                self._blocks.append(to_columns(list(self._training_rows(lines))))
        self._keep_table(self._passing)

    def take_superseded(self, path: Path) -> None:
        """Where a run was resumed, the rows that it then wrote again are kept apart: of them only what happened is told."""
        if not path.is_file():
            return
        with path.open("rb") as file:
            for line in file:
                row = parse(line)
                if row is None:
                    self.damaged += bool(line.strip())
                elif "skipped" in row:
                    self.marks.append(Mark(kind="skipped", step=row["step"], text=f"skipped, and repeated: {row['skipped']}"))

    def _training_rows(self, lines: list[bytes]) -> Iterator[Row]:
        for line in lines:
            row = parse(line)
            if row is None:
                self.damaged += bool(line.strip())
            elif "loss" in row:
                self._note_training(row)
                yield row
            else:
                self._note_other(row)

    def _note_training(self, row: Row) -> None:
        step, samples = row["step"], row["samples"] if isinstance(row.get("samples"), int) else 0
        if step <= self._last[0]:
            back = f"back to step {step - 1} from step {self._last[0]}"
            if samples > self._last[1]:  # the data goes on, so the run took the weights back and not itself
                self.marks.append(Mark(kind="rollback", step=step, text=f"rolled back: {back}"))
            else:
                self.marks.append(Mark(kind="restart", step=step, text=f"restarted: {back}, these steps were repeated"))
            drop_from(step, self.evaluations)
            drop_from(step, self.snapshots)
        self._last = (step, samples)
        if "skipped" in row:
            self.marks.append(Mark(kind="skipped", step=step, text=f"skipped: {row['skipped']}"))

    def _note_other(self, row: Row) -> None:
        step = row["step"]
        if "val_loss" in row:  # before the first training row after a rollback, where these come more often
            drop_from(step, self.evaluations)
            self.evaluations.append(row)
        elif "save_failed" in row:
            self.marks.append(Mark(kind="save_failed", step=step, text=f"save failed: {row['save_failed']}"))
        elif "save_seconds" in row:
            self.marks.append(Mark(kind="checkpoint", step=step, text=f"checkpoint step_{step}"))
            self.saves.append(row)
        elif "resumed" in row:
            self.marks.append(Mark(kind="restart", step=step, text=str(row["resumed"])))
        elif "expert_load" in row or "update_to_weight" in row or any(name.startswith("eval/") for name in row):
            drop_from(step + 1, self.snapshots)  # several at one step
            self._take_table(row)
            self.snapshots.append(row)

    def _take_table(self, row: Row) -> None:
        """`expert_load` as an array where it is one of those that are kept: evenly fewer the more there are, and the newest."""
        if "expert_load" not in row:
            return
        self._passing.pop("expert_load", None)
        at, self._tables = self._tables, self._tables + 1
        self._passing = row if at % self._every else {}
        if self._passing:
            return
        self._keep_table(row)
        if at // self._every >= MOST_TABLES:
            self._every *= 2
            for earlier in [kept for kept in self.snapshots if "expert_load" in kept][1::2]:
                del earlier["expert_load"]

    def _keep_table(self, row: Row) -> None:
        if (table_YE := to_table(row.pop("expert_load", None))) is not None:
            row["expert_load"] = table_YE

    def columns(self) -> Columns:
        """Every step once: what a restart or a rollback did again counts as it went the last time."""
        joined = join([block for block in self._blocks if len(block)])
        if not len(joined):
            return joined
        later = np.minimum.accumulate(joined.steps[::-1])[::-1]
        return joined.where(np.append(joined.steps[:-1] < later[1:], True))
