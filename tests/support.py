"""Functions that tests of several folders call."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def deepspeed_command(ranks: int) -> list[str]:
    """The launcher of this environment, on a port of its own so that runs can go on side by side."""
    from launch.ranks.join import free_port

    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--quiet", "--num_gpus", str(ranks), "--master_port", str(free_port())]


def metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def process_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat (proc_pid_stat(5)) after the name, which may hold anything: the state is the first."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def fill_pipe(writer: int) -> None:
    """Until nothing more goes in: a terminal on hold, which nobody reads."""
    os.set_blocking(writer, False)
    try:
        while os.write(writer, bytes(4096)):
            pass
    except BlockingIOError:
        os.set_blocking(writer, True)


def checkpoint_layers(model: Any, on: bool = True, **options: Any) -> None:
    """By transformers' own switch: its next major version has the new name alone, the oldest that works has the old one alone."""
    names = [f"{what}_checkpointing_{'enable' if on else 'disable'}" for what in ("activation", "gradient")]
    switch = next(getattr(model, name) for name in names if hasattr(model, name))
    switch(*([options] if options else []))
