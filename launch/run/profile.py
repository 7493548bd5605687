"""`--profile N`: what N steps of training are made of, as a trace for chrome://tracing or Perfetto and as a table.

RUN/profile/trace_rank0.json.gz   every rank's own
RUN/profile/table.txt, .json      rank 0's steps by part; the parts add up to the step
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data.files import replace_file, replace_json
from launch.profiling.ranges import Method, named_parts
from launch.profiling.timeline import seconds_by_part
from launch.run.metrics import Monitor

#: Steps before the first that is traced: of plain training, whose time the table compares with, and of the profiler's own start.
PLAIN, STARTING = 3, 1


class StepProfile:
    """Told of every step. Before the first of its steps and after the last nothing is different from a run without it, and in
    between only what the profiler notes: no number that is trained changes."""

    def __init__(self, run: Path, steps: int, model: nn.Module, methods: Sequence[Method], monitor: Monitor) -> None:
        self.folder, self.steps = run / "profile", steps
        self._model, self._methods, self._monitor = model, methods, monitor
        self._seconds: list[float] = []  # by the clock, of all steps up to the last of the trace
        self._open = ExitStack()
        self._profiler: torch.profiler.profile | None = None
        self.written = False

    def after_step(self, seconds: float) -> None:
        """Opens the trace before the first step of it, and writes it after the last."""
        if self.written:
            return
        self._seconds.append(seconds)
        if self._profiler is not None:
            self._profiler.step()
        if len(self._seconds) == PLAIN:
            schedule = torch.profiler.schedule(wait=0, warmup=STARTING, active=self.steps, repeat=1)
            self._open.enter_context(named_parts(self._model, self._methods))
            self._profiler = self._open.enter_context(torch.profiler.profile(schedule=schedule))
        if len(self._seconds) == PLAIN + STARTING + self.steps:
            self._write()

    def close(self) -> None:
        """At the run's end, which may come before the last step of the trace: then what there is."""
        if self.written:
            return
        if len(self._seconds) > PLAIN + STARTING:
            self._write()
        else:
            self._open.close()
            self._monitor.say(f"no profile: it begins with step {PLAIN + STARTING + 1} of a start, and this one took fewer")

    def _write(self) -> None:
        assert self._profiler is not None
        self.written = True
        self._open.close()
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / f"trace_rank{dist.get_rank()}.json.gz"
        self._profiler.export_chrome_trace(str(trace))
        if dist.get_rank() == 0:
            table = self._table(trace)
            replace_json(self.folder / "table.json", table)
            replace_file(self.folder / "table.txt", as_text(table).encode())
            self._monitor.say(f"{as_text(table)}profile: {self.folder} has this table and the trace of each rank")
        self._profiler = None

    def _table(self, trace: Path) -> dict[str, Any]:
        """Milliseconds of a step, by part and by the clock."""
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            found = seconds_by_part(json.load(file)["traceEvents"])
        plain, traced = self._seconds[1:PLAIN], self._seconds[PLAIN + STARTING :]
        return {
            "steps": len(traced),
            "ms": {part: 1e3 * seconds / len(traced) for part, seconds in found.items()},
            "ms_of_a_step": 1e3 * sum(traced) / len(traced),
            "ms_of_a_step_without_profiler": 1e3 * sum(plain) / len(plain),
        }


def as_text(table: dict[str, Any]) -> str:
    """For a terminal, the largest part first."""
    total = sum(table["ms"].values())
    lines = [f"{'ms':>10} {'share':>7}  of a step (mean of {table['steps']}, rank 0)"]
    lines += [f"{ms:10.2f} {ms / total:7.1%}  {part}" for part, ms in sorted(table["ms"].items(), key=lambda pair: -pair[1]) if ms]
    clock = f"by the clock {table['ms_of_a_step']:.2f}, without the profiler {table['ms_of_a_step_without_profiler']:.2f}"
    lines.append(f"{total:10.2f} {1:7.1%}  sum; {clock}")
    return "\n".join(lines) + "\n"
