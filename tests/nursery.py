"""Ranks in a tenth of a second: a process that has imported everything forks them on request.

A rank that starts from nothing spends seconds of CPU on importing torch, DeepSpeed and transformers; a suite that starts
hundreds would do little else. Each rank is a process of its own that runs the script by its path, takes signals and dies like
any other; only its imports are inherited. The `deepspeed` launcher and cold starts have tests of their own.

As a program it reads one JSON request a line from stdin and answers with one line.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import process_stat

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1


class Nursery:
    """The client. `start` ranks; end with `close`, which takes every rank along that still lives."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path},
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery has died"
        return json.loads(answer)

    def start(
        self,
        world_size: int,
        script: str,
        *arguments: object,
        log: Path,
        errors: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> Ranks:
        """`script ARGUMENTS` as `world_size` ranks; their output goes to `log`, stderr to `errors` (None: there too)."""
        from launch.ranks.spawn import free_port

        shared = {
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        environments = [
            {**{k: str(v) for k, v in shared.items()}, "RANK": str(r), "LOCAL_RANK": str(r), **(env or {})}
            for r in range(world_size)
        ]
        pids = self.ask(do="start", environments=environments, argv=[script, *map(str, arguments)], log=log, errors=errors or log)
        return Ranks(nursery=self, pids=pids, log=log)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


@dataclass(kw_only=True)
class Ranks:
    """The processes of one run, by rank."""

    nursery: Nursery
    pids: list[int]
    log: Path
    codes: dict[int, int] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)  # monotonic time at which an end was seen

    def poll(self) -> dict[int, int]:
        """Exit codes (negative: a signal) of the ranks that have ended."""
        waiting = [pid for rank, pid in enumerate(self.pids) if rank not in self.codes]
        if waiting:
            for pid, code in self.nursery.ask(do="poll", pids=waiting).items():
                rank = self.pids.index(int(pid))
                self.codes[rank], self.ended[rank] = code, time.monotonic()
        return self.codes

    def wait(self, timeout: float = 180) -> list[int]:
        """All exit codes. Ranks that are still there after `timeout` seconds are killed, and the test fails with the log."""
        self.until(lambda: len(self.poll()) == len(self.pids), "the end of all ranks", timeout)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def until(self, condition: Callable[[], object], what: str, timeout: float = 120) -> None:
        """Wait for something that the ranks bring about."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                alive = [r for r in range(len(self.pids)) if r not in self.poll()]
                self.signal(signal.SIGQUIT)  # their stacks, into the log
                time.sleep(1)
                self.signal(signal.SIGKILL)
                raise AssertionError(f"no {what} after {timeout} s; ranks {alive} lived:\n{self.text()[-6000:]}")
            time.sleep(0.01)

    def until_said(self, text: str, timeout: float = 120) -> None:
        def said() -> bool:
            if text in self.text():
                return True
            assert len(self.poll()) < len(self.pids), f"the ranks ended without saying {text!r}:\n{self.text()[-6000:]}"
            return False

        self.until(said, f"{text!r} in the log", timeout)

    def until_paused(self, rank: int, where: str = "") -> None:
        """What `faults/pausing.py` does to a rank: it says so first, and a SIGCONT before the stop would be lost."""
        self.until_said(f"rank {rank} pauses{where}")
        self.until(lambda: process_stat(self.pids[rank])[0] == "T", f"stop of rank {rank}")

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks (None: to all) that have not ended."""
        self.poll()
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:  # else the pid may be another process's by now
                os.kill(self.pids[rank], number)


# ---------------------------------------------------------------------- the server


def serve() -> None:
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - an engine with ZeRO does, and with it all of torch.compile

    import launch.run.preflight
    import launch.run.session  # noqa: F401

    gc.freeze()  # a rank's collections write into what it shares with the others no more
    parent = os.getpid()
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        answer = fork_all(**request) if do == "start" else ended(**request)
        if os.getpid() != parent:
            return  # a rank whose script has ended
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def fork_all(environments: list[dict[str, str]], argv: list[str], **output: str) -> list[int]:
    pids = []
    for environment in environments:
        pid = os.fork()
        if not pid:
            run_rank(environment, argv, **output)
            return []
        pids.append(pid)
    return pids


def run_rank(environment: dict[str, str], argv: list[str], log: str, errors: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, log), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    faulthandler.register(signal.SIGQUIT)
    os.environ.update(environment)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name="__main__")


def ended(pids: list[int]) -> dict[int, int]:
    codes = {}
    for pid in pids:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes


if __name__ == "__main__":
    serve()
