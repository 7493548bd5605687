"""Run candidates against their tests, several at a time, and say of each whether it passed.

The verdict is read from the judge, a process that the candidate cannot reach: see `sandbox/inside/judge.py`.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import IO

from data.cli import UserError
from launch.evaluation.job import Job, Verdict
from launch.evaluation.sandbox.levels import Level
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.process import Confined, start

LOOK_SECONDS = 0.1  # between two looks at what a running program uses
END_SECONDS = 1.0  # that a candidate has, whose judge has ended, to end too
VERDICT_BYTES = 1 << 16
TRIES = 3


class SandboxError(UserError):
    """A sandbox that ended before its program began to run, which is no verdict about the program."""


def execute(job: Job, *, level: Level, limits: Limits, slot: int) -> Verdict:
    """What `attempt` says, which is tried again where the sandbox fails. Raises SandboxError if that does not help."""
    reason = ""
    for _ in range(TRIES):
        try:
            return attempt(job, level=level, limits=limits, slot=slot)
        except SandboxError as error:
            reason = str(error)
    raise SandboxError(
        f"{TRIES} times a sandbox ended before its program began ({reason}); look whether this machine lacks memory, processes "
        "(ulimit -u) or time (fewer --workers), and run the same command again"
    )


def attempt(job: Job, *, level: Level, limits: Limits, slot: int) -> Verdict:
    """One candidate and its judge, each in a sandbox of its own; both have ended when this returns."""
    with ExitStack() as stack:
        calls, replies = os.pipe(), os.pipe()
        ours = [*calls, *replies]
        try:
            program = stack.enter_context(held_text(job.program))
            task = {name: value for name, value in asdict(job).items() if name != "program"}
            question = stack.enter_context(held_text(json.dumps(task)))
            candidate = start(level, limits, role="candidate", slot=2 * slot, stdin=program, descriptors=(calls[0], replies[1]))
            stack.callback(candidate.end)
            judge = start(
                level,
                limits,
                role="judge",
                slot=2 * slot + 1,
                stdin=question,
                stdout=subprocess.PIPE,
                descriptors=(replies[0], calls[1]),
            )
            stack.callback(judge.end)
        finally:
            for descriptor in ours:
                os.close(descriptor)
        return read_verdict(judge, candidate, limits.wall_seconds)


@contextmanager
def held_text(text: str) -> Iterator[IO[bytes]]:
    """A nameless file with this text, to be read from its start."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.seek(0)
        yield file


def read_verdict(judge: Confined, candidate: Confined, seconds: float) -> Verdict:
    """What the judge says before `seconds` on the clock are over and while the candidate keeps to its limits.

    Raises SandboxError where that is nothing.
    """
    assert judge.process.stdout
    said, until = b"", time.monotonic() + seconds
    with judge.process.stdout as output:
        while True:
            left = max(until - time.monotonic(), 0)  # 0: what it has said is still read, for this thread may have waited for others
            if select.select([output], [], [], min(left, LOOK_SECONDS))[0]:
                if part := os.read(output.fileno(), VERDICT_BYTES):
                    said += part
                    continue
                verdict = parse_verdict(said)
                return verdict if verdict.passed else failed(said, "timed out" if ran_out(candidate) else verdict.result)
            if not left:
                verdict = parse_verdict(said)
                return verdict if verdict.passed else failed(said, "timed out")
            if excess := candidate.excess() or judge.excess():
                return failed(said, f"failed: more {excess} than the sandbox allows")


def failed(said: bytes, result: str) -> Verdict:
    """Raises SandboxError if the judge has said nothing: it and the candidate had not met, and no line of the program has run."""
    if not said:
        raise SandboxError(result)
    return Verdict(passed=False, result=result)


def ran_out(candidate: Confined) -> bool:
    """Whether it was ended for its processor time: the exit code is then 128 and the signal's number, at every level."""
    try:
        return candidate.process.wait(END_SECONDS) == 128 + signal.SIGXCPU
    except subprocess.TimeoutExpired:
        return False


def parse_verdict(said: bytes) -> Verdict:
    try:
        verdict = json.loads(said)
        return Verdict(passed=verdict["passed"] is True, result=str(verdict["result"]))
    except (ValueError, KeyError, TypeError):
        return Verdict(passed=False, result="failed: the tests ended without a verdict")


def first_slot(level: Level, workers: int) -> int:
    """Of one of the ranges of `workers` slots that share no user, so that another evaluation on this machine most probably has
    another. It is drawn, since process numbers are alike in every container."""
    return workers * secrets.randbelow((level.most_workers or workers) // workers)


def execute_all(jobs: Iterable[Job], *, level: Level, limits: Limits, workers: int) -> Iterator[Verdict]:
    """Verdicts in the order of the jobs, `workers` candidates at a time."""
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    first = first_slot(level, workers)
    for slot in range(first, first + workers):
        slots.put(slot)

    def run(job: Job) -> Verdict:
        slot = slots.get()
        try:
            return execute(job, level=level, limits=limits, slot=slot)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(run, jobs)
