"""A run that was stopped and resumed is the uninterrupted run, to the bit: losses, norms, loads, rates, biases, moments."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import STEPS, Site, assert_same, content, last_saved, rows


def test_the_comparison_can_fail(site: Site, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other_seed"
    site.finish(other, seed=4321)
    assert content(other) != content(whole)
    with pytest.raises(AssertionError):
        assert_same(other, whole)


def test_two_runs_are_the_same(site: Site, whole: Path, tmp_path: Path) -> None:
    site.finish(tmp_path / "again")
    assert_same(tmp_path / "again", whole)


@pytest.mark.parametrize("stops", [(5, 6, 11), *(pytest.param((n,), marks=pytest.mark.slow) for n in range(1, STEPS))], ids=str)
def test_stopped_and_resumed(site: Site, whole: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """At any step, at a step that evaluates, twice in a row."""
    run = tmp_path / "run"
    for stop in stops:
        site.finish(run, stop_after=stop)
        assert last_saved(run) == f"step_{stop}"
    resumed = site.finish(run)
    assert f"resuming from {run / 'checkpoints'}/step_{stops[-1]}" in resumed.text()
    assert_same(run, whole)


def test_what_is_compared_is_not_trivial(whole: Path) -> None:
    steps = [row for row in rows(whole) if "loss" in row]
    assert len({row["loss"] for row in steps}) == len({row["lr"] for row in steps}) == len(steps)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert all(layer > 0 for layer in steps[-1]["bias_range"])
    assert sum("val_loss" in row for row in rows(whole)) == 3
