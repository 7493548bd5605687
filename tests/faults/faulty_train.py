"""`launch/train.py` with a fault of the environment's choosing planted on rank 1; started like it.

FAULT: which one. FAULT_SAMPLES: at which positions in the data (samples consumed before the step); by default at step 5.
"""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import pausing
import torch

from launch.checkpoint.engine_files import CheckpointFiles
from launch.cli import run_command
from launch.run import trainer
from launch.train import main

RANK = 1
UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)


def plant(name: str, samples: list[int]) -> None:
    inner = trainer.Trainer.next_batches

    def next_batches(self: trainer.Trainer) -> Any:
        batches = inner(self)
        resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
        if self.watchdog.training and self.position.samples in samples and self.rank == RANK:
            FAULTS[name](self)
        return batches

    trainer.Trainer.next_batches = next_batches  # type: ignore[method-assign]


def fail(error: BaseException, _: trainer.Trainer) -> NoReturn:
    raise error


def spin(_: trainer.Trainer) -> None:
    while True:
        time.sleep(0.01)


def distort(factor: float, run: trainer.Trainer) -> None:
    """The last hidden states of this rank's next forward, times `factor`."""

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return output * factor

    handle = run.engine.module.model.norm.register_forward_hook(hook)


def full(_: trainer.Trainer) -> None:
    """Until the next step no file of this rank grows beyond 10,000 bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, UNLIMITED[1]))


def broken_save(_: trainer.Trainer) -> None:
    """A fault of the program, not of the disk, while a checkpoint is written."""

    def keep(*_: object) -> NoReturn:
        raise KeyError("weights")

    CheckpointFiles._keep = keep  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[trainer.Trainer], None]] = {
    "raise": partial(fail, ZeroDivisionError("planted")),
    "disk": partial(fail, OSError(errno.EIO, "planted")),
    "memory": partial(fail, torch.OutOfMemoryError("planted")),
    "spin": spin,
    "full": full,
    "broken save": broken_save,
    "nan": partial(distort, float("nan")),
    "spike": partial(distort, 50.0),
}

if __name__ == "__main__":
    pausing.install()
    plant(os.environ["FAULT"], [int(n) for n in os.environ.get("FAULT_SAMPLES", "40").split(",")])
    run_command(main)
