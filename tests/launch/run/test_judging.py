"""Which evaluation is the best so far, what a lost one leaves, when a run stops for want of one, what a checkpoint holds of it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from scripted_validation import ScriptedValidation, judging

from launch.checkpoint.state import TrainingState
from launch.run.judging import Judging, Verdict

BEST, NO_BEST = Verdict(is_best=True), Verdict()


def best_of(one: Judging) -> tuple[float | None, int | None]:
    return one.best_loss, one.best_step


def test_a_loss_below_the_best_is_the_best() -> None:
    one = judging(8.0, 7.0, 7.0, 7.5, 6.5)
    assert best_of(one) == (None, None)
    assert [one.judge(step) for step in range(0, 10, 2)] == [BEST, BEST, NO_BEST, NO_BEST, BEST]
    assert best_of(one) == (6.5, 8)


def test_an_evaluation_is_logged_and_told() -> None:
    one: Any = judging(8.0, 7.0)
    one.judge(2)
    one.validation.sink_mass = [0.25, 0.5]
    one.judge(4)
    row = {"step": 2, "val_loss": 8.0, "val_bits_per_byte": 16.0}
    assert one.monitor.rows == [row, {"step": 4, "val_loss": 7.0, "val_bits_per_byte": 14.0, "attention_sink_mass": [0.25, 0.5]}]
    assert one.monitor.said[0] == "step 2  validation loss 8.0000  16.0000 bits per byte"
    assert one.watchdog.places == [(2, "evaluation"), (4, "evaluation")], "before it, for who hangs in it"


def test_an_evaluation_that_is_not_finite_is_said_and_counts_for_nothing() -> None:
    """NaN as the first made every later loss no best, and `--patience` ended a run whose loss fell."""
    one: Any = judging(math.nan, 8.3, math.inf, math.nan, math.nan, 8.1, patience=2)
    verdicts = [one.judge(step) for step in range(6)]
    assert sum("the validation loss is not finite; it counts for nothing" in line for line in one.monitor.said) == 4
    assert verdicts == [NO_BEST, BEST, NO_BEST, NO_BEST, NO_BEST, BEST] and best_of(one) == (8.1, 5)


@pytest.mark.parametrize("patience", [0, 2])
def test_patience_is_for_evaluations_in_a_row(patience: int) -> None:
    one = judging(8, 9, 7, 9, 6, 7, 6, patience=patience)
    reasons = [one.judge(step).reason_to_stop for step in range(7)]
    last = "stopped early: 2 evaluations without a new best" if patience else ""
    assert reasons == [""] * 6 + [last]


def test_a_run_without_validation_has_no_best_and_no_patience() -> None:
    one = judging(validation=None, patience=1)
    assert [one.judge(step) for step in (2, 4)] == [NO_BEST, NO_BEST] and best_of(one) == (None, None)


@pytest.mark.parametrize("heard_before", [2, 3], ids=["between", "after_the_next_best"])
def test_a_best_that_could_not_be_saved_is_no_best(heard_before: int) -> None:
    """`best` stayed at a worse one for ever: no later loss came below that of the checkpoint that is nowhere. A save in the
    background is heard of late, perhaps with the next best already found: that one stays."""
    one, verdicts = judging(8.0, 7.0, 6.5 if heard_before == 3 else 7.5, 6.4), []
    for step in range(4):
        if step == heard_before:
            one.take_back(1)
            assert best_of(one) == ((6.5, 2) if heard_before == 3 else (8.0, 0))
        verdicts.append(one.judge(step))
    assert verdicts == [BEST] * 4
    one.take_back(3)
    assert best_of(one) == ((6.5, 2) if heard_before == 3 else (7.5, 2))


def test_without_its_only_best_a_run_has_none() -> None:
    one = judging(8.0)
    one.judge(5)
    one.take_back(5)
    assert best_of(one) == (None, None)
    one.give_back(4)
    assert best_of(one) == (None, None), "of another step"
    one.give_back(5)
    assert best_of(one) == (8.0, 5), "which was saved after all"


def saved(one: Judging) -> TrainingState:
    """By way of JSON, as the trainer writes it."""
    state = TrainingState(
        step=4, samples=32, tokens=99, best_loss=one.best_loss, best_step=one.best_step, extra={**one.extra(), "wandb_id": "x"}
    )
    return TrainingState(**json.loads(json.dumps(asdict(state))))


def test_what_is_saved_is_what_a_run_goes_on_with() -> None:
    """One that forgot its best loss would replace the best; one that forgot the bad evaluations would never stop."""
    one, again = judging(8.0, 7.5, 9.0), judging(7.6, 7.4, patience=2)
    for step in range(3):
        one.judge(step)
    again.restore(saved(one))
    assert best_of(again) == (7.5, 1)
    assert again.judge(5).reason_to_stop.startswith("stopped early: 2 ")
    assert again.judge(6).is_best
    again.take_back(6)
    assert best_of(again) == (7.5, 1), "which has a checkpoint"


def test_a_rollback_takes_the_best_of_its_checkpoint() -> None:
    one = judging(8.0, 7.0, 7.5)
    one.judge(0)
    before = saved(one)
    one.judge(2)
    one.restore(before)
    assert best_of(one) == (8.0, 0) and one.judge(2).is_best


def test_whose_the_best_is_may_not_be_known() -> None:
    """Of a checkpoint whose version did not write it."""
    one = judging(2.0)
    extra = {"bad_evaluations": 2}
    one.restore(TrainingState(step=4, samples=32, tokens=99, best_loss=1.25, extra=extra))
    one.take_back(4)
    assert best_of(one) == (1.25, None) and one.judge(6) == NO_BEST and one.bad_evaluations == 3


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        (("a", 16), ("a", 16), True),
        (("a", 16), ("a", 8), False),  # another --eval_batches
        (("a", 16), ("b", 16), False),  # other shards
        (None, ("a", 16), True),  # of an older version
        (("a", 16), None, True),  # --eval_interval 0: the next start may judge on them again
    ],
)
def test_a_best_on_other_samples_is_none(before: tuple[str, int] | None, now: tuple[str, int] | None, kept: bool) -> None:
    """Of several folders the first alone was judged: what was the best there is below all that follows, and ended runs early."""
    mine, theirs = (dict(zip(("fingerprint", "samples"), facts, strict=True)) if facts else None for facts in (now, before))
    extra = {"bad_evaluations": 2, **({"judged_on": theirs} if theirs else {})}
    state = TrainingState(step=4, samples=32, tokens=99, best_loss=1.25, best_step=2, extra=extra)
    one = judging(validation=ScriptedValidation(**mine) if mine else None)  # type: ignore[arg-type]
    one.restore(state)
    assert one.was_judged_on_others(state) != kept
    assert (*best_of(one), one.bad_evaluations) == ((1.25, 2, 2) if kept else (None, None, 0))
    assert one.extra()["judged_on"] == (mine or theirs)


def test_a_run_says_from_its_first_checkpoint_on_what_it_was_judged_on() -> None:
    assert judging().extra() == {"bad_evaluations": 0, "judged_on": {"fingerprint": "a", "samples": 16}}


@pytest.mark.parametrize("extra", [{}, {"bad_evaluations": None}, {"bad_evaluations": "many"}])
def test_what_makes_no_sense_is_not_taken(extra: dict[str, Any]) -> None:
    one = judging(8.0)
    one.judge(0)
    with pytest.raises((KeyError, TypeError, ValueError)):
        one.restore(TrainingState(step=4, samples=32, tokens=99, best_loss=1.25, extra=extra))
    assert best_of(one) == (8.0, 0)


def test_tasks_are_measured_by_name_in_one_row_and_decide_nothing() -> None:
    one: Any = judging(tasks={"code": ScriptedValidation(3.0, 2.0), "text": ScriptedValidation(1.0, 0.5)}, patience=1)
    one.measure_tasks(2)
    figures = {"code_loss": 3.0, "code_bits_per_byte": 6.0, "text_loss": 1.0, "text_bits_per_byte": 2.0}
    assert one.monitor.rows == [{"step": 2, **{f"eval/{name}": value for name, value in figures.items()}}]
    assert one.monitor.said == ["step 2  bits per byte: code 6.0000, text 2.0000"]
    assert one.watchdog.places == [(2, "evaluation of code"), (2, "evaluation of text")]
    one.measure_tasks(4)
    assert best_of(one) == (None, None) and one.bad_evaluations == 0


def test_without_tasks_nothing_is_said_of_them() -> None:
    one: Any = judging(8.0)
    one.measure_tasks(2)
    assert not one.monitor.rows and not one.monitor.said
