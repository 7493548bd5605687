"""`launch/train.py` with a fault of the environment's choosing planted on rank 1 at step 5; started like it."""

from __future__ import annotations

import errno
import os
import time
from typing import Any, NoReturn

import torch

from launch import trainer
from launch.errors import run_command
from launch.train import main

STEP, RANK = 5, 1


def plant(name: str) -> None:
    inner = trainer.Trainer.next_batches

    def next_batches(self: trainer.Trainer) -> Any:
        batches = inner(self)
        if self.watchdog.training and self.position.step == STEP and self.rank == RANK:
            FAULTS[name](batches)
        return batches

    trainer.Trainer.next_batches = next_batches  # type: ignore[method-assign]


def fail(error: BaseException) -> NoReturn:
    raise error


def spin() -> None:
    while True:
        time.sleep(0.01)


FAULTS = {
    "raise": lambda _: fail(ZeroDivisionError("planted")),
    "disk": lambda _: fail(OSError(errno.EIO, "planted")),
    "memory": lambda _: fail(torch.OutOfMemoryError("planted")),
    "spin": lambda _: spin(),
}

if __name__ == "__main__":
    plant(os.environ["FAULT"])
    run_command(main)
