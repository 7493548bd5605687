"""Export a checkpoint, let it write for problems, run that in the sandbox: what training starts (`run/checkpoint_eval.py`).

python -m launch.evaluation.of_checkpoint RUN/checkpoints/step_N RUN/evaluations PROBLEMS NAME=TASK=FILE...

Leaves `step_N.NAME.json` and its samples in the folder, and nothing of the export.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from data.lock import try_lock
from launch.cli import CLONE

NEW_TOKENS = 256
HELD = "held"  # locked for as long as its process lives


def main() -> int:
    checkpoint, folder, count, *tasks = sys.argv[1:]
    os.nice(19)  # training goes first
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the export goes with us
    name = Path(checkpoint).name
    for earlier in Path(folder).glob(f"{name}.*.*"):  # of other weights, where the step was trained again
        earlier.unlink()
    clear_dead(Path(folder))
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as scratch, open(Path(scratch) / HELD, "wb") as held:
        try_lock(held)
        exported = Path(scratch) / "hf"
        call("export.py", "--checkpoint", checkpoint, "--output", exported)
        for task in tasks:
            title, kind, file = task.split("=", 2)
            output = Path(folder) / f"{name}.{title}.json"
            flags = ("--problems", count, "--temperature", 0, "--max_new_tokens", NEW_TOKENS, "--allow_code_execution")
            samples = output.with_suffix(".samples.jsonl")
            call("evaluate.py", "--model", exported, f"--{kind}", file, *flags, "--output", output, "--samples_file", samples)
    return 0


def clear_dead(folder: Path) -> None:
    """What judges left that were killed; another, of a run that has ended since, may still be at its own."""
    for scratch in folder.glob(".step_*-*"):
        with suppress(OSError), open(scratch / HELD, "rb+") as held:
            if try_lock(held):  # not where the file system has no locks
                shutil.rmtree(scratch, ignore_errors=True)


def call(command: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(CLONE / "launch" / command), *map(str, arguments)], check=True)


if __name__ == "__main__":
    sys.exit(main())
