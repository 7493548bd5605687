"""When a checkpoint is written: each step once, again where it is the best, anew where it failed; a second failure ends a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.checkpoint.choose import ResumeFrom
from launch.checkpoint.state import TrainingState
from launch.cli import AgreedError
from launch.run.saving import Saving


class Checkpoints:
    """As much of the manager as `Saving` calls. `failing`: how many of the next saves fail, at once or in the background."""

    def __init__(self, *, background: bool) -> None:
        self.background, self.failing = background, 0
        self.asked: list[tuple[int, bool]] = []
        self.failed = False

    def save(self, engine: Any, state: TrainingState, *, is_best: bool, counted: bool, skipped: int) -> Path:
        self.asked.append((state.step, is_best))
        self.counted, self.skipped = counted, skipped
        self.failed, self.failing = self.failing > 0, max(0, self.failing - 1)
        if self.failed and not self.background:
            raise AgreedError(f"writing step_{state.step} failed")
        return Path(f"step_{state.step}")

    def wait(self) -> None:
        if self.failed:
            self.failed = False
            raise AgreedError(f"writing step_{self.asked[-1][0]} failed")

    def load(self, engine: Any, choice: Any) -> TrainingState:
        return choice.state


class Run:
    """A `Saving` and what it said, logged and told."""

    def __init__(self, *, background: bool) -> None:
        self.checkpoints = Checkpoints(background=background)
        self.said: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.told: list[str] = []
        self.lost: list[int] = []
        self.again: list[int] = []
        self.applied: list[str] = []
        monitor: Any = SimpleNamespace(say=self.said.append, log=self.rows.append)
        settings: Any = SimpleNamespace(apply=lambda: self.applied.append("settings"))
        checkpoints, engine = self.checkpoints, None
        self.saving = Saving(
            engine=engine,  # type: ignore[arg-type]
            settings=settings,
            checkpoints=checkpoints,  # type: ignore[arg-type]
            monitor=monitor,
            on_saved=self.told.append,
            on_best_lost=self.lost.append,
            on_best_again=self.again.append,
        )


@pytest.fixture(params=[False, True], ids=["at once", "background"])
def run(request: pytest.FixtureRequest) -> Run:
    return Run(background=request.param)


def state(step: int) -> TrainingState:
    return TrainingState(step=step, samples=8 * step, tokens=99)


def now(step: int) -> tuple[int, Callable[[], TrainingState]]:
    return step, lambda: state(step)


def choice(step: int, *, is_own: bool = True) -> ResumeFrom:
    return ResumeFrom(message="", path=Path(f"step_{step}"), state=state(step), is_own=is_own)


def test_a_step_is_written_once_and_again_as_the_best(run: Run) -> None:
    for step, best in ((4, False), (4, False), (4, True), (6, True), (6, False)):
        run.saving.save(*now(step), is_best=best)
    run.saving.finish(*now(6))
    assert run.checkpoints.asked == [(4, False), (4, True), (6, True)]
    assert run.told == ["step_4", "step_4", "step_6"] and not any("warning" in line for line in run.said)
    run.saving.finish(*now(7))
    assert run.checkpoints.asked[-1] == (7, False) and run.told[-1] == "step_7", "nothing may end unsaved"


def test_a_save_is_pending_until_it_is_waited_for() -> None:
    run = Run(background=True)
    run.saving.save(*now(4))
    assert not run.told and not run.said
    run.saving.finish_pending_save(5)
    run.saving.finish_pending_save(6)
    assert run.told == ["step_4"] and [line.split("  ")[0] for line in run.said] == ["step 5"]


def test_what_failed_at_the_last_step_is_written_anew(run: Run) -> None:
    run.checkpoints.failing = 1
    run.saving.save(*now(4))
    run.saving.finish_pending_save(4)
    assert run.saving.last_failure is not None and "the next save that fails ends the run" in run.said[-1]
    run.saving.finish(*now(4))
    assert run.checkpoints.asked == [(4, False)] * 2 and run.told == ["step_4"] and run.saving.last_failure is None


def test_a_save_of_the_last_step_that_fails_in_the_background_is_tried_again() -> None:
    """It ended the run with everything since the save before it lost, and the state still in memory."""
    run = Run(background=True)
    run.checkpoints.failing = 1
    run.saving.save(*now(4))
    run.saving.finish(*now(4))
    assert run.checkpoints.asked == [(4, False)] * 2 and run.told == ["step_4"] and not run.again
    run.checkpoints.failing = 2
    run.saving.save(*now(6))
    with pytest.raises(AgreedError, match="writing step_6 failed"):
        run.saving.finish(*now(6))


def test_the_best_of_the_last_step_is_written_again_as_the_best(run: Run) -> None:
    """`best` stayed at a worse one, with exit code 0."""
    run.checkpoints.failing = 1
    run.saving.save(*now(4), is_best=True)
    run.saving.finish(*now(4))
    assert run.checkpoints.asked == [(4, True)] * 2 and run.lost == run.again == [4] and run.told == ["step_4"]


def test_one_failure_is_survived_and_two_in_a_row_are_not(run: Run) -> None:
    for step in (4, 5, 6, 7):  # every second one
        run.checkpoints.failing = step % 2
        run.saving.save(*now(step))
        run.saving.finish_pending_save(step)
    assert run.told == ["step_4", "step_6"]
    assert [row["save_failed"] for row in run.rows if "save_failed" in row] == [f"writing step_{n} failed" for n in (5, 7)]
    run.checkpoints.failing = 1
    with pytest.raises(AgreedError, match="writing step_8 failed"):
        run.saving.save(*now(8))
        run.saving.finish_pending_save(8)


def test_a_best_that_fails_is_told(run: Run) -> None:
    for step, best in ((4, False), (5, True), (6, True)):
        run.checkpoints.failing = step < 6
        run.saving.last_failure = None
        run.saving.save(*now(step), is_best=best)
        run.saving.finish_pending_save(step + 1)
    assert run.lost == [5]


def test_only_what_was_to_be_the_best_is_told(run: Run) -> None:
    run.saving.save(*now(4), is_best=True)
    run.checkpoints.failing = 1
    run.saving.save(*now(5))
    run.saving.finish_pending_save(6)
    assert run.told == ["step_4"] and run.saving.last_failure is not None and not run.lost, "the best is there"


def test_the_state_is_asked_for_once_the_save_before_is_over() -> None:
    """What is the best so far may change with it."""
    run = Run(background=True)
    run.checkpoints.failing = 1
    run.saving.save(*now(4), is_best=True)
    seen: list[list[int]] = []
    run.saving.save(5, lambda: (seen.append(run.lost[:]), state(5))[1])
    assert seen == [[4]]


def test_a_failure_that_is_heard_later_leaves_the_present_step_to_be_saved() -> None:
    """The save of step 4 failed in the background, which is heard at step 5: as the best this was not written, and counted."""
    run = Run(background=True)
    run.checkpoints.failing = 1
    run.saving.save(*now(4))
    run.saving.finish_pending_save(5)
    run.saving.save(*now(5), is_best=True)
    run.saving.finish_pending_save(6)
    assert run.checkpoints.asked == [(4, False), (5, True)] and run.told == ["step_5"]


def test_a_run_does_not_end_well_on_a_save_that_failed(run: Run) -> None:
    run.saving.save(*now(4))
    run.checkpoints.failing = 1
    with pytest.raises(AgreedError, match="writing step_5 failed"):
        run.saving.finish(*now(5))


def test_what_was_loaded_is_saved_already_and_trains_by_the_json(run: Run) -> None:
    load = run.checkpoints.load
    run.checkpoints.load = lambda *given: (run.applied.append("weights"), load(*given))[1]  # type: ignore[method-assign]
    run.saving.load(choice(4))
    assert run.applied == ["weights", "settings"], "a checkpoint brings the settings that it was saved with"
    run.saving.save(*now(4))
    run.saving.save(*now(5))
    assert run.checkpoints.asked == [(5, False)]


def test_what_was_loaded_from_another_run_is_not_saved_in_this_one(run: Run) -> None:
    """With no step left to train it ended with "finished", exit code 0 and an empty folder."""
    run.saving.load(choice(4, is_own=False))
    run.saving.finish(*now(4))
    assert run.told == ["step_4"]


def test_how_many_steps_were_skipped_is_told(run: Run) -> None:
    run.saving.save(*now(4), skipped=2)
    assert run.checkpoints.skipped == 2
    run.saving.finish(*now(5), skipped=3)
    assert run.checkpoints.skipped == 3


def test_a_step_that_failed_as_the_best_is_not_tried_again_a_moment_later(run: Run) -> None:
    """Evaluation and save at the same step: that was the second failure in a row, and ended a run on a disk full for a moment."""
    run.checkpoints.failing = 2
    run.saving.save(*now(4), is_best=True)
    run.saving.save(*now(4))
    run.checkpoints.failing = 0
    run.saving.finish_pending_save(5)
    run.saving.save(*now(6))
    run.saving.finish(*now(6))
    assert run.checkpoints.asked == [(4, True), (6, False)] and run.told == ["step_6"]


def test_a_step_that_failed_is_saved_when_it_comes_again_after_a_rollback(run: Run) -> None:
    run.checkpoints.failing = 1
    run.saving.save(*now(6))
    run.saving.finish_pending_save(6)
    run.saving.load(choice(4))
    run.saving.save(*now(6))
    run.saving.finish_pending_save(6)
    assert run.checkpoints.asked == [(6, False)] * 2 and run.told == ["step_6"]
