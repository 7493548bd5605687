"""What the trainer makes of a checkpoint's state beyond what the checkpoint itself can judge."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from launch.checkpoint.state import TrainingState
from launch.run.spikes import SpikeDetector
from launch.run.trainer import Position, Trainer


def restored(extra: dict[str, Any]) -> Any:
    trainer = SimpleNamespace(spikes=SpikeDetector(sigma=6, window=50, rollback_after=3), saving=SimpleNamespace(saved_at=-1))
    Trainer.restore(trainer, TrainingState(step=4, samples=32, tokens=99, extra=extra))  # type: ignore[arg-type]
    return trainer


def test_a_state_comes_back() -> None:
    state = SpikeDetector(sigma=6, window=50, rollback_after=3).state()
    trainer = restored({"guard": state, "bad_evaluations": 2, "wandb_id": "x"})
    assert (trainer.position.step, trainer.position.samples, trainer.position.bad_evaluations) == (4, 32, 2)


@pytest.mark.parametrize("extra", [{}, {"guard": 3, "bad_evaluations": 0, "wandb_id": ""}, {"guard": {}, "wandb_id": ""}])
def test_a_state_without_sense_is_a_sentence(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"step_4/state\.json: extra is not what a run of this system saves"):
        restored(extra)


def test_an_evaluation_that_is_not_finite_is_said_and_counts_for_nothing() -> None:
    """NaN as the first made every later loss no best, and `--patience` ended a run whose loss fell."""
    said: list[str] = []
    saved: list[int] = []
    position = Position()
    monitor = SimpleNamespace(log=lambda row: None, say=said.append)
    validation = SimpleNamespace(bits_per_byte=lambda loss: loss, sink_mass=None)
    trainer = SimpleNamespace(
        position=position,
        monitor=monitor,
        outcome="",
        arguments=SimpleNamespace(patience=2),
        save=lambda *, is_best: saved.append(position.step),
    )
    for step, loss in enumerate([math.nan, 8.3, math.inf, math.nan, math.nan, 8.1]):
        position.step = step
        Trainer.record_validation(trainer, loss, validation)  # type: ignore[arg-type]
    assert sum("the validation loss is not finite; it counts for nothing" in line for line in said) == 4
    assert saved == [1, 5] and position.best_loss == 8.1 and not trainer.outcome
