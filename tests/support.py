"""Functions that tests of several folders call."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Shards, a run of two ranks (ZeRO 2, EP 2) and its settings, by the code as it was before its modules moved to their rooms.
OLD = ROOT / "tests" / "fixtures" / "before_the_move"


def deepspeed_command(ranks: int) -> list[str]:
    """The launcher of this environment, on a port of its own so that runs can go on side by side."""
    from launch.ranks.spawn import free_port

    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--quiet", "--num_gpus", str(ranks), "--master_port", str(free_port())]


def metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def process_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat (proc_pid_stat(5)) after the name, which may hold anything: the state is the first."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def without_path() -> dict[str, str]:
    """The environment where nothing of ours is found but by where a script lies: by PYTHONPATH a copy would be found twice."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@contextmanager
def readable_copy(*names: str) -> Iterator[Path]:
    """Those files and folders of ours where any user can read them: root's clone may lie in its home."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, target)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        yield Path(folder)


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
