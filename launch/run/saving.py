"""When a checkpoint is written, and what becomes of one that could not be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from deepspeed.runtime.engine import DeepSpeedEngine

from launch.checkpoint.choose import ResumeFrom
from launch.checkpoint.manager import CheckpointManager
from launch.checkpoint.state import TrainingState
from launch.cli import AgreedError
from launch.engine.settings import EngineSettings
from launch.run.metrics import Monitor


@dataclass(kw_only=True)
class Saving:
    """The saves of a run. Collective: every rank calls every method, in the same order.

    With `--async_save` a save is pending when `save` returns, and a thread writes it while training goes on. A save that fails
    on any rank is said, and training goes on to the next: the disk may have been full for a moment. A second in a row ends the
    run. That is for mistakes that a person can mend; a fault of the program ends the run wherever it comes up.
    """

    engine: DeepSpeedEngine
    settings: EngineSettings
    checkpoints: CheckpointManager
    monitor: Monitor
    on_saved: Callable[[str], None]  # told of every checkpoint that is complete, by its name
    on_best_lost: Callable[[int], None]  # told of the step whose save was to be the best and failed
    on_best_again: Callable[[int], None]  # and that it is saved once more
    saved_at: int = -1  # the step of the newest checkpoint that is written or pending
    last_failure: AgreedError | None = None
    failed_at: int = -1  # the step of the save that failed last
    _is_best: bool = False
    _saved_before: int = -1
    _pending: str = ""
    _finishing: bool = False
    _started: float = field(default=0.0, repr=False)

    def load(self, choice: ResumeFrom) -> TrainingState:
        """What was saved, and the settings of the JSON, which may have changed since."""
        state = self.checkpoints.load(self.engine, choice)
        self.settings.apply()
        # What lies in another run's folder is not saved in this one: with no step left it ended with exit code 0 and nothing.
        self.saved_at, self.failed_at = state.step if choice.is_own else -1, -1
        return state

    def save(
        self, step: int, state: Callable[[], TrainingState], *, is_best: bool = False, counted: bool = True, skipped: int = 0
    ) -> None:
        """A checkpoint of now. `is_best` also where the step has one already. `counted`, `skipped`: see `CheckpointManager.save`.

        `state` is asked once the save before it is over: where that was the best and failed, another is the best so far.
        """
        if self.saved_at == step and not is_best:
            return
        if self.failed_at == step and not self._finishing:  # as the best, a moment ago: nothing is different now
            return
        self.finish_pending_save(step)
        self._started, self._is_best = time.monotonic(), is_best
        self._saved_before, self.saved_at = self.saved_at, step
        try:
            path = self.checkpoints.save(self.engine, state(), is_best=is_best, counted=counted, skipped=skipped)
            self._pending = path.name
        except AgreedError as error:
            self._record_failure(error, step)
            return
        self.monitor.log({"step": step, "save_seconds": time.monotonic() - self._started})
        if not self.checkpoints.background:
            self.finish_pending_save(step)

    def finish_pending_save(self, step: int) -> None:
        """Wait for the save that is under way, if there is one, and say at `step` how it went."""
        if not self._pending:
            return
        name, self._pending = self._pending, ""
        try:
            self.checkpoints.wait()
        except AgreedError as error:
            self._record_failure(error, step)
            return
        self.last_failure = None
        self.monitor.say(f"step {step}  saved {name} in {time.monotonic() - self._started:.1f} s")
        self.on_saved(name)

    def finish(self, step: int, state: Callable[[], TrainingState], *, skipped: int = 0) -> None:
        """At the end of a run: nothing may end with exit code 0 unsaved. Raises the failure of the last save."""
        self.finish_pending_save(step)  # where that fails there is the state still, to be saved once more
        self._finishing = True
        again = self.failed_at == step and self._is_best
        if again:
            self.on_best_again(step)
        self.save(step, state, is_best=again, skipped=skipped)
        self.finish_pending_save(step)
        if self.last_failure is not None:
            raise self.last_failure

    def _record_failure(self, error: AgreedError, step: int) -> None:
        if self.last_failure is not None:
            raise error
        self.last_failure, self.failed_at, self.saved_at = error, self.saved_at, self._saved_before
        if self._is_best:
            self.on_best_lost(self.failed_at)
        self.monitor.log({"step": step, "save_failed": str(error)})
        if not self._finishing:  # which raises it at once
            self.monitor.say(f"warning: step {step}: {error}; the next save that fails ends the run")
