"""Does it learn? Finite numbers, the loss, gradient norms, validation against training."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from launch.reporting.checks import LEAST_ROWS, WINDOWS, Flag, is_finite, last_part, some_steps, window_medians
from launch.reporting.columns import Floats
from launch.reporting.read import NOT_FINITE, Run

WARM_UP = 0.05  # share of the rows whose gradient norms may be anything
HIGH_NORM = 10.0
MOSTLY_CLIPPED = 0.5  # of the last tenth
GAP_NATS, GAP_SHARE = 0.25, 0.15  # validation over training: at least so much, and so much of the loss


def not_finite(run: Run) -> Iterator[Flag]:
    train = run.train
    steps = {mark.step for mark in run.marks if mark.kind == "skipped" and NOT_FINITE.search(mark.text)}
    finite = np.ones(len(train), np.bool_)
    for name in ("loss", "grad_norm"):
        if name in train.scalars:
            finite &= np.isfinite(train.scalars[name])
    steps |= set(train.steps[~finite].tolist())
    steps |= {int(row["step"]) for row in run.evaluations if not is_finite(row.get("val_loss"))}
    if not steps:
        return
    lasting = not finite[-1:].all()
    yield Flag(
        level="bad" if lasting else "look",
        title="Not finite" + (", and still so" if lasting else ""),
        detail=f"Loss or gradient norm was NaN or infinite at step {some_steps(sorted(steps))}.",
        advice="Weights were kept as they were at skipped steps. Read the samples named in metrics.jsonl (skipped_samples); if it "
        "comes back, lower the learning rate, check the warm-up, and prefer bf16 to fp16.",
    )


def loss_rises(run: Run) -> Iterator[Flag]:
    medians = window_medians(run.train.get("loss"))
    if not len(medians):
        return
    best, now = int(np.argmin(medians)), float(medians[-2:].min())
    # How far neighboring windows lie apart anyway: batches of different text, which is more than the noise within a window.
    scatter = float(np.median(np.abs(np.diff(medians[WINDOWS // 2 :]))))
    rise = now - float(medians[best])
    if best >= WINDOWS - 2 or rise <= max(0.02 * abs(float(medians[best])), 4 * scatter) or not _mostly_upwards(medians[best:]):
        return
    where = int(run.train.steps[min(len(run.train) - 1, int((best + 0.5) / WINDOWS * len(run.train)))])
    if _validation_still_falls(run, where):
        return
    yield Flag(
        level="bad",
        title="The loss rises",
        detail=f"It was {medians[best]:.3f} around step {where:,} and is {now:.3f} now ({rise:+.3f}).",
        advice=f"Go back to a checkpoint from about step {where:,} (--resume .../checkpoints/step_N) with a lower learning rate; "
        "look at the gradient norm and at the router's logits around the turn.",
    )


def _mostly_upwards(values: Floats) -> bool:
    """Of all pairs, four in five have the later one higher."""
    listed = values.tolist()
    pairs = [later > earlier for i, earlier in enumerate(listed) for later in listed[i + 1 :]]
    return bool(sum(pairs) >= 0.8 * len(pairs))


def always_clipped(run: Run) -> Iterator[Flag]:
    share = last_part(run.train.get("clipped_share"))
    share = share[np.isfinite(share)]
    if len(run.train) >= LEAST_ROWS and len(share) and share.mean() > MOSTLY_CLIPPED:
        yield Flag(
            level="look",
            title="Nearly every step is clipped",
            detail=f"{share.mean():.0%} of the last steps had a gradient norm over gradient_clipping.",
            advice="The clip then sets the size of the steps, and the schedule's rate does not: lower the learning rate, or raise "
            "gradient_clipping to about twice the usual norm.",
        )


def _validation_still_falls(run: Run, step: int) -> bool:
    """The last evaluation is after `step` and the best of all: then it is the batches that got harder, not the model worse."""
    rows = [row for row in run.evaluations if is_finite(row.get("val_loss"))]
    return bool(rows) and rows[-1]["step"] > step and rows[-1]["val_loss"] <= min(row["val_loss"] for row in rows)


def high_norm(run: Run) -> Iterator[Flag]:
    norm = run.train.get("grad_norm")
    late, steps = norm[int(len(norm) * WARM_UP) :], run.train.steps[int(len(norm) * WARM_UP) :]
    over = late > HIGH_NORM
    if not over.any():
        return
    lasting = float(np.nanmedian(last_part(norm))) > HIGH_NORM if np.isfinite(last_part(norm)).any() else False
    finite = late[np.isfinite(late)]
    yield Flag(
        level="bad" if lasting else "look" if over.mean() > 0.01 else "note",
        title=f"Gradient norm over {HIGH_NORM:g}",
        detail=f"{int(over.sum()):,} of {len(late):,} logged steps after warm-up ({over.mean():.1%}), first at step "
        f"{steps[over][0]:,}; " + (f"the largest was {finite.max():.4g}." if len(finite) else "none of them was finite."),
        advice="A few are clipped and do no harm. If they last, lower the learning rate or lengthen the warm-up. Under Muon the "
        "norm is measured after orthogonalization and says nothing.",
    )


def _training_loss_near(run: Run, step: int) -> float:
    """Mean of the logged losses around a step: a twentieth of them, and at least ten."""
    loss = run.train.get("loss")
    near = loss[np.argsort(np.abs(run.train.steps - step), kind="stable")[: max(10, len(loss) // 20)]]
    return float(np.nanmean(near)) if np.isfinite(near).any() else math.nan


def validation_apart(run: Run) -> Iterator[Flag]:
    rows = [row for row in run.evaluations if is_finite(row.get("val_loss"))]
    loss = run.train.get("loss")
    if not rows or len(loss) < LEAST_ROWS:
        return
    step, validation = int(rows[-1]["step"]), float(rows[-1]["val_loss"])
    training = _training_loss_near(run, step)
    # The smaller of the last two: the batches around one evaluation may be easy ones.
    gap = min(float(row["val_loss"]) - _training_loss_near(run, int(row["step"])) for row in rows[-2:])
    best = min(float(row["val_loss"]) for row in rows)
    rising = validation > best * 1.02
    if not (gap > max(GAP_NATS, GAP_SHARE * training) or (rising and gap > GAP_NATS / 2)):
        return
    yield Flag(
        level="bad" if rising else "look",
        title="Validation is far over training" + (" and rises" if rising else ""),
        detail=f"At step {step:,} validation is {validation:.3f} and training {training:.3f}, {validation - training:.3f} apart"
        + (f"; validation was {best:.3f} at its best." if rising else "."),
        advice="The model learns its samples by heart: use more data or fewer epochs, take the best checkpoint (checkpoints/best), "
        "or check that both splits come from the same sources.",
    )
