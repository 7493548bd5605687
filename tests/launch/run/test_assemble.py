"""What the first lines of a run say."""

from __future__ import annotations

from launch.run.assemble import when_saved


def test_checkpoints_of_a_new_best_are_said() -> None:
    assert when_saved(50_000, evaluates=True) == "a checkpoint every 50,000 and at each new best validation loss"
    assert when_saved(50_000, evaluates=False) == "a checkpoint every 50,000"
