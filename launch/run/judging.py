"""The best so far: what the validation loss says of a run, and `--eval_tasks`, which decide nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from launch.checkpoint.state import TrainingState
from launch.ranks.watchdog import Watchdog
from launch.run.metrics import Monitor
from launch.run.validation import Validation


class Verdict(NamedTuple):
    """What follows from an evaluation. `reason_to_stop`: in words, empty where there is none."""

    is_best: bool = False
    reason_to_stop: str = ""


@dataclass(kw_only=True)
class Judging:
    """Evaluates a run and remembers its best loss. Collective.

    A loss is the best from its evaluation on, while its checkpoint is still to be written, and with `--async_save` perhaps that
    of the best before it as well. Where one fails, `take_back` forgets its loss: else `best` stayed at a worse one for ever, for
    no later loss comes below that of a checkpoint that is nowhere.
    """

    validation: Validation | None
    tasks: dict[str, Validation]
    patience: int  # evaluations in a row without a new best, after which a run stops; 0: it never does
    monitor: Monitor
    watchdog: Watchdog
    bad_evaluations: int = 0  # in a row, without a new best
    judged_on: dict[str, Any] | None = None  # as loaded, for a run without validation to hand on: see `Validation.judged_on`
    #: Falling losses, each with the step of its evaluation (None: of a checkpoint whose version did not write it).
    _bests: list[tuple[float, int | None]] = field(default_factory=list)
    _taken_back: list[tuple[float, int | None]] = field(default_factory=list)

    @property
    def best_loss(self) -> float | None:
        return self._bests[-1][0] if self._bests else None

    @property
    def best_step(self) -> int | None:
        return self._bests[-1][1] if self._bests else None

    def judge(self, step: int) -> Verdict:
        """Evaluate, where there is validation data, and log the loss. What is not finite counts for nothing: NaN as the first
        would make no later loss a best."""
        if self.validation is None:
            return Verdict()
        self.watchdog.at(step, "evaluation")
        loss = self.validation.mean_loss()
        self._record(step, loss, self.validation)
        if not math.isfinite(loss):
            self.monitor.say(f"warning: step {step}: the validation loss is not finite; it counts for nothing")
            return Verdict()
        if self.best_loss is None or loss < self.best_loss:
            self._bests.append((loss, step))
            self.bad_evaluations = 0
            return Verdict(is_best=True)
        self.bad_evaluations += 1
        if self.patience and self.bad_evaluations >= self.patience:
            return Verdict(reason_to_stop=f"stopped early: {self.bad_evaluations} evaluations without a new best")
        return Verdict()

    def _record(self, step: int, loss: float, validation: Validation) -> None:
        bits = validation.bits_per_byte(loss)
        row: dict[str, Any] = {"step": step, "val_loss": loss, "val_bits_per_byte": bits}
        if validation.sink_mass:
            row["attention_sink_mass"] = validation.sink_mass
        self.monitor.log(row)
        self.monitor.say(f"step {step}  validation loss {loss:.4f}  {bits:.4f} bits per byte")

    def measure_tasks(self, step: int) -> None:
        """Each of `--eval_tasks` by name, in one row. Nothing here changes what is trained, or which checkpoint is the best."""
        if not self.tasks:
            return
        row: dict[str, Any] = {"step": step}
        for name, task in self.tasks.items():
            self.watchdog.at(step, f"evaluation of {name}")
            loss = task.mean_loss()
            row |= {f"eval/{name}_loss": loss, f"eval/{name}_bits_per_byte": task.bits_per_byte(loss)}
        self.monitor.log(row)
        shown = ", ".join(f"{name} {row[f'eval/{name}_bits_per_byte']:.4f}" for name in self.tasks)
        self.monitor.say(f"step {step}  bits per byte: {shown}")

    def take_back(self, step: int) -> None:
        """No checkpoint has the best of `step`: the one before it is the best again."""
        self._taken_back = [best for best in self._bests if best[1] == step]
        self._bests = [best for best in self._bests if best[1] != step]

    def give_back(self, step: int) -> None:
        """The best of `step` is saved after all."""
        self._bests += [best for best in self._taken_back if best[1] == step]

    def extra(self) -> dict[str, Any]:
        """For `TrainingState.extra`, beside the state's own best loss and step."""
        judged_on = self.judged_on if self.validation is None else self.validation.judged_on()
        return {"bad_evaluations": self.bad_evaluations, "judged_on": judged_on}

    def restore(self, state: TrainingState) -> None:
        """What a best on other samples was says nothing about those of this run. Raises KeyError, TypeError and ValueError where
        `extra` is not what this class made of it."""
        bad, judged_on = int(state.extra["bad_evaluations"]), state.extra.get("judged_on")  # older versions did not save it
        bests = [] if state.best_loss is None else [(state.best_loss, state.best_step)]
        anew = self.was_judged_on_others(state)
        self._bests, self.bad_evaluations, self.judged_on = [] if anew else bests, 0 if anew else bad, judged_on

    def was_judged_on_others(self, state: TrainingState) -> bool:
        """Is the best loss of `state` one on other samples than this run is judged on?"""
        before = state.extra.get("judged_on")
        return self.validation is not None and before not in (None, self.validation.judged_on())
