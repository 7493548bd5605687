"""What the trainer makes of a checkpoint's state beyond what the checkpoint itself can judge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launch.checkpoint.state import TrainingState
from launch.run.spikes import SpikeDetector
from launch.run.trainer import Trainer


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
