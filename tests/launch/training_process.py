"""One rank of a small real training run (DeepSpeed, AutoEP, gloo) for the checkpoint tests, and the launcher of such ranks.

`launch_ranks(2, "function", **arguments)` runs a function of `scenarios.py` in that many processes and returns what it
returned on rank 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.ranks.join import free_port

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {
        **os.environ,
        **{name: str(value) for name, value in own.items()},
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(HERE)]),
    }


def start_ranks(world_size: int, scenario: str, **arguments: Any) -> list[subprocess.Popen[str]]:
    """One process a rank. Their output goes to one temporary file, which a failing `wait_for` shows."""
    port = free_port()
    command = [sys.executable, str(HERE / "scenarios.py"), scenario, json.dumps(arguments, default=str)]
    out = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115 - read by wait_for
    processes = []
    for rank in range(world_size):
        process = subprocess.Popen(command, env=rank_environment(rank, world_size, port), stdout=out, stderr=out, text=True)
        process.log = out.name  # type: ignore[attr-defined]
        processes.append(process)
    return processes


def wait_for(processes: list[subprocess.Popen[str]], timeout: float = 300) -> list[int]:
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def launch_ranks(world_size: int, scenario: str, **arguments: Any) -> Any:
    """Run to the end; returns what rank 0 returned (through JSON). A failing rank fails the test with its output."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        processes = start_ranks(world_size, scenario, answer=answer, **arguments)
        codes = wait_for(processes)
        said = Path(processes[0].log).read_text()  # type: ignore[attr-defined]
        assert codes == [0] * world_size, f"{scenario}: exit codes {codes}\n{said[-6000:]}"
        return json.loads(answer.read_text())
