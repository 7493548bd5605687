"""Loss spikes: a step whose loss or gradient norm is non-finite or far out is skipped, by all ranks alike.

The decision is a pure function of numbers that every rank holds (the all-reduced loss and the global gradient norm), so the
ranks cannot disagree. The window that mean and deviation are taken over is part of the checkpoint: a resumed run judges its
first step as the uninterrupted one would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

#: Judged only from this many accepted steps on: before, mean and deviation say little.
LEAST_HISTORY = 32
#: A deviation counts as at least this much: of a loss as a share of its mean, of a norm's logarithm as it is. Without it a curve
#: that happens to be flat would call its next wiggle a spike. At 6 sigma: 6 % above the mean loss, 1.8 times the mean norm.
LEAST_LOSS_DEVIATION, LEAST_NORM_DEVIATION = 0.01, 0.1


def outlier(value: float, window: list[float], sigma: float, least: float = 0.0) -> bool:
    """Is `value` more than `sigma` standard deviations above the window's mean? Only upwards: a low loss is no fault."""
    if len(window) < LEAST_HISTORY:
        return False
    mean = math.fsum(window) / len(window)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))
    return value > mean + sigma * max(deviation, least)


@dataclass(kw_only=True)
class SpikeDetector:
    """`reason_to_skip` before the optimizer step, then `accept_step` or `skip_step`.

    `sigma` 0 leaves only the check for finite numbers.
    """

    sigma: float
    window: int
    rollback_after: int
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0
    skipped_in_all: int = 0

    def reason_to_skip(self, loss: float, grad_norm: float) -> str | None:
        """None where the step may be taken, else the reason to skip it."""
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", grad_norm, self.norms)):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if self.sigma and window and self._far_out(value, window, is_norm=window is self.norms):
                mean = math.fsum(window) / len(window)
                return f"{name} {value:.4g} is over {self.sigma:g} sigma above its mean {mean:.4g} of {len(window)} steps"
        return None

    def _far_out(self, value: float, window: list[float], *, is_norm: bool) -> bool:
        """Norms are compared by their logarithms: they are positive and spread by factors. On a linear scale three times the mean
        is far out, and a small model at a high learning rate lost seven of ten steps to that, with a falling loss."""
        if is_norm:
            logs = [math.log(max(x, 1e-30)) for x in window]
            return outlier(math.log(max(value, 1e-30)), logs, self.sigma, LEAST_NORM_DEVIATION)
        return outlier(value, window, self.sigma, LEAST_LOSS_DEVIATION * abs(math.fsum(window) / len(window)))

    def accept_step(self, loss: float, grad_norm: float) -> None:
        self.skipped_in_a_row = 0
        self.losses.append(loss)
        self.norms.append(grad_norm)
        self._cut_to_window()

    def _cut_to_window(self) -> None:
        for numbers in (self.losses, self.norms):
            del numbers[: max(0, len(numbers) - self.window)]

    def skip_step(self, *, in_a_row: bool = True) -> bool:
        """Count a skipped step; True where the run should roll back. Not `in_a_row`: fp16 looks for its loss scale, which takes
        some steps by design and says nothing about the run."""
        self.skipped_in_all += 1
        if not in_a_row:
            return False
        self.skipped_in_a_row += 1
        return bool(self.rollback_after) and self.skipped_in_a_row >= self.rollback_after

    def forget_history(self) -> None:
        """Judge anew from here on: what was far out has become the level, and there is nothing to go back to."""
        self.losses, self.norms, self.skipped_in_a_row = [], [], 0

    def begin_after_rollback(self, skipped_in_all: int) -> None:
        """The history is the checkpoint's; what was skipped since then stays counted, and the next step begins a new row."""
        self.skipped_in_all, self.skipped_in_a_row = skipped_in_all, 0

    def state(self) -> dict[str, Any]:
        """JSON-able; floats survive JSON exactly."""
        return {
            "losses": self.losses,
            "norms": self.norms,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_in_all": self.skipped_in_all,
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._cut_to_window()  # which may be smaller now: at 0 nothing is judged by what the checkpoint remembers
