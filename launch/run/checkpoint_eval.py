"""pass@1 of `--eval_tasks NAME=PROBLEMS` while a run trains: a process beside rank 0 judges checkpoints as they are written.

It has a low priority, no GPU, and random numbers of its own; nothing that is trained depends on it.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import sentence
from data.files import read_json
from launch.evaluation.problems import ProblemFile
from launch.ranks.spawn import environment_of_no_rank
from launch.run.metrics import Monitor


@dataclass(kw_only=True)
class CheckpointEvaluator:
    """Of rank 0. `begin` for each checkpoint, `take` now and then; one checkpoint is judged at a time, those in between are not."""

    output: Path
    files: dict[str, ProblemFile]
    problems: int
    monitor: Monitor
    _process: subprocess.Popen[bytes] | None = None
    _name: str = ""

    @property
    def folder(self) -> Path:
        return self.output / "evaluations"

    def begin(self, name: str) -> None:
        """Judge the checkpoint `name`, unless another is still being judged."""
        if not self.files or not self.monitor.enabled or self._process is not None:
            return
        try:
            self._process = self._start(name)
        except OSError as error:  # a full disk, no process or memory left
            self.monitor.say(f"warning: {name} cannot be judged ({error.strerror or error}); training goes on")
        self._name = name

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        self.folder.mkdir(exist_ok=True)
        checkpoint = self.output / "checkpoints" / name
        tasks = [f"{title}={file.task}={file.path.resolve()}" for title, file in self.files.items()]
        command = [sys.executable, "-P", "-m", "launch.evaluation.of_checkpoint"]
        environment = environment_of_no_rank() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with open(self.folder / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                [*command, str(checkpoint), str(self.folder), str(self.problems), *tasks],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is not for it
            )

    def take(self, step: int) -> None:
        """Log what has been found since."""
        if self._process is None or self._process.poll() is None:
            return
        failed, name, self._process = self._process.returncode != 0, self._name, None
        if failed:
            self.monitor.say(f"warning: step {step}: {name} could not be judged; see {self.folder / name}.log")
            return
        row: dict[str, Any] = {"step": step}
        try:
            for title in self.files:
                found = read_json(self.folder / f"{name}.{title}.json")
                row |= {f"eval/{title}_pass@1": found["pass@1"], f"eval/{title}_of_step": int(name.removeprefix("step_"))}
                self.monitor.say(f"step {step}  {title} of {name}: pass@1 {found['pass@1']:.4f} of {found['problems']} problems")
        except (OSError, ValueError, KeyError, TypeError) as error:  # deleted meanwhile, or written by another version
            self.monitor.say(f"warning: step {step}: what was found of {name} cannot be read ({sentence(error)}); training goes on")
            return
        self.monitor.log(row)

    def leave(self) -> None:
        """At the end of training, which does not wait for it."""
        if self._process is not None and self._process.poll() is None:
            self.monitor.say(f"{self._name} is still being judged; its results will lie in {self.folder}")
