"""One forward and backward at full size before the first step, so that running out of memory or of disk shows at once."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator

import torch

from launch.checkpoint.engine_files import state_bytes
from launch.checkpoint.random_state import random_state, set_random_state
from launch.cli import AgreedError
from launch.ranks.control_group import ControlGroup
from launch.run.trainer import Trainer

ENGINE_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def rehearse(trainer: Trainer, ranks: ControlGroup) -> None:
    """One forward and backward of the run's own next batch through the real engine, discarded: weights, gradients, random
    states, loads and counters are as before, so that the first step is the same to the bit. Collective.

    Raises AgreedError where the disk cannot hold a checkpoint; running out of memory is told as such by the rank it happens on.
    """
    check_space(trainer, ranks)
    engine = trainer.engine
    with _without_trace(trainer):
        batches, targets = trainer.next_batches()
        batches = batches[:2]  # with accumulation, also the memory of gradients that are kept
        engine.micro_steps = trainer.accumulation - len(batches)  # the last of them is then the step's boundary
        trainer.accumulate(batches, targets, "preflight: one step at full size, ")
        trainer.step_hook.step(lambda _: "a rehearsal")


def check_space(trainer: Trainer, ranks: ControlGroup) -> None:
    """The disk holds the first checkpoint; later saves check again. Collective."""
    needed = sum(ranks.gather(state_bytes(trainer.engine)))
    folder = trainer.saving.checkpoints.folder.path  # which may be a link to another disk
    place = folder if folder.is_dir() else trainer.arguments.output
    free = ranks.run_on_rank0(lambda: shutil.disk_usage(place).free)
    if free < needed:
        raise AgreedError(f"a checkpoint takes about {needed / 1e6:,.1f} MB and {place} has {free / 1e6:,.1f} MB free; make room")


@contextlib.contextmanager
def _without_trace(trainer: Trainer) -> Iterator[None]:
    engine = trainer.engine
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    before = random_state(), {name: getattr(engine, name) for name in ENGINE_COUNTERS}
    scaler_before = copy.deepcopy(vars(scaler)) if scaler is not None else {}
    waited = trainer.health.data_seconds
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"out of memory in one step of {trainer.micro_batch} x {trainer.arguments.sequence_length} tokens; lower "
            f"train_micro_batch_size_per_gpu or --sequence_length, or set activation_checkpointing.mode to full ({error})"
        ) from error
    for name, value in before[1].items():
        setattr(engine, name, value)
    if scaler is not None:
        vars(scaler).update(scaler_before)
    trainer.balancer.reset()
    trainer.health.data_seconds = waited
    set_random_state(before[0])
