"""Verdicts, appended as they come, so that judging goes on where it was interrupted: hours, for 200 samples of each problem."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from launch.evaluation.job import Job, Verdict


class VerdictFile:
    """Of one judging: it is removed when all are there, for who asks again wants them anew."""

    def __init__(self, path: Path, circumstances: str) -> None:
        """circumstances: what a verdict depends on beside its job. What an interrupted write left behind whole lines is cut off."""
        self.path, self.circumstances = path, circumstances
        self.found: dict[str, Verdict] = {}
        with open(path, "ab+") as file:
            file.seek(0)
            lines = file.read().split(b"\n")[:-1]
            file.truncate(sum(len(line) + 1 for line in lines))
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # damaged: it is judged again
                row = json.loads(line)
                self.found[row["job"]] = Verdict(passed=row["passed"], result=row["result"])

    def key(self, job: Job) -> str:
        return hashlib.sha256(f"{self.circumstances} {job}".encode()).hexdigest()

    def __contains__(self, job: Job) -> bool:
        return self.key(job) in self.found

    def __getitem__(self, job: Job) -> Verdict:
        return self.found[self.key(job)]

    def append(self, job: Job, verdict: Verdict) -> None:
        self.found[self.key(job)] = verdict
        with open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps({"job": self.key(job), **asdict(verdict)}).encode() + b"\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
