"""Each red flag is raised by its fault and by nothing else: every fault in turn against a run that has none."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import expected_loss, healthy_rows, write_run

from launch.reporting.flags import flags_of
from launch.reporting.read import read_run

Row = dict[str, Any]


def titles(folder: Path, rows: list[Row], **config: Any) -> dict[str, str]:
    """Level by title."""
    return {flag.title: flag.level for flag in flags_of(read_run(write_run(folder, rows, **config)))}


def late(name: str, value: Any, after: int = 800) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        if row["step"] > after:
            row[name] = value(row[name]) if callable(value) else value

    return change


def test_a_healthy_run_has_no_flag(tmp_path: Path) -> None:
    assert titles(tmp_path / "run", healthy_rows()) == {}


def test_a_run_of_three_steps_has_no_flag(tmp_path: Path) -> None:
    assert titles(tmp_path / "run", healthy_rows(1000)[:3]) == {}


def rising(row: Row) -> None:
    row["loss"] += max(0, row["step"] - 500) * 0.002


FAULTS = {
    "Not finite, and still so": ("bad", late("loss", math.nan)),
    "The loss rises": ("bad", rising),
    "Gradient norm over 10": ("bad", late("grad_norm", 25.0)),
    "Collapsed experts": ("bad", late("unused_experts", [0.0, 0.5, 0.0, 0.0])),
    "The experts collapse": ("bad", late("load_max_over_mean", [1.1, 1.2, 3.8, 1.1])),
    "The experts' load is uneven": ("look", late("load_max_over_mean", [1.1, 1.2, 2.2, 1.1])),
    "The router's logits grow": ("look", lambda row: row.update(router_logit_rms=[1.0, 1.0, 1.0, row["step"] / 20])),
    "Nearly every step is clipped": ("look", lambda row: row.update(clipped_share=0.9)),
    "Training waits for data": ("look", lambda row: row.update(step_seconds=2.0, data_seconds=0.5)),
    "Training slows down": ("look", late("tokens_per_second", lambda speed: speed * 0.6)),
}


@pytest.mark.parametrize("title", FAULTS)
def test_a_fault_raises_its_flag_alone(tmp_path: Path, title: str) -> None:
    level, change = FAULTS[title]
    rows = healthy_rows(change=change)
    if title == "The loss rises":  # and validation with it
        for row in rows:
            if "val_loss" in row:
                row["val_loss"] += max(0, row["step"] - 500) * 0.002
    assert titles(tmp_path / "run", rows) == {title: level}


def test_a_loss_that_rises_over_harder_batches_is_no_flag_while_validation_falls(tmp_path: Path) -> None:
    assert "The loss rises" not in titles(tmp_path / "run", healthy_rows(change=rising))


def test_noise_between_windows_is_no_rise(tmp_path: Path) -> None:
    """Ten seeds of text that differs from stretch to stretch, as in a run of small batches, with a flat end."""
    for seed in range(10):
        noise, level = random.Random(seed), 0.0
        rows = [row for row in healthy_rows(400, 1) if "loss" in row]
        for row in rows:
            level = 0.8 * level + noise.gauss(0, 0.1)
            row["loss"] = expected_loss(min(row["step"], 200)) + level
        assert "The loss rises" not in titles(tmp_path / str(seed), rows), seed


def test_the_imbalance_of_the_first_steps_is_nothing(tmp_path: Path) -> None:
    """It falls from nearly all tokens on two experts to what would still be crowded if it stayed."""
    start = healthy_rows(400, 1, change=lambda row: row.update(load_max_over_mean=[1.1, 3.9 - row["step"] / 50, 1.1, 1.1]))
    assert titles(tmp_path / "run", start[:80]) == {}


def test_balancing_that_is_off_is_said(tmp_path: Path) -> None:
    rows = healthy_rows(change=lambda row: row.update(load_max_over_mean=[1.1, 1.2, 3.8, 1.1], bias_range=[0.0] * 4))
    (flag,) = flags_of(read_run(write_run(tmp_path / "run", rows)))
    assert flag.level == "bad" and "Balancing is off" in flag.advice


def test_one_large_norm_is_only_noted(tmp_path: Path) -> None:
    rows = healthy_rows()
    next(row for row in rows if row["step"] == 600)["grad_norm"] = 12.0
    assert titles(tmp_path / "run", rows) == {"Gradient norm over 10": "note"}


def test_norms_that_are_all_infinite(tmp_path: Path) -> None:
    found = titles(tmp_path / "run", healthy_rows(change=late("grad_norm", math.inf, after=0)))
    assert found["Gradient norm over 10"] == "look" and found["Not finite, and still so"] == "bad"


def test_large_norms_of_the_warm_up_are_nothing(tmp_path: Path) -> None:
    assert titles(tmp_path / "run", healthy_rows(change=lambda row: row.update(grad_norm=40.0) if row["step"] < 40 else None)) == {}


def validation(rows: list[Row], gap: Callable[[int], float]) -> list[Row]:
    return [row | ({"val_loss": row["val_loss"] + gap(row["step"])} if "val_loss" in row else {}) for row in rows]


def test_validation_far_over_training(tmp_path: Path) -> None:
    apart = titles(tmp_path / "apart", validation(healthy_rows(), lambda step: 0.6))
    assert apart == {"Validation is far over training": "look"}
    turning = titles(tmp_path / "turning", validation(healthy_rows(), lambda step: max(0, step - 400) * 0.002))
    assert turning == {"Validation is far over training and rises": "bad"}


@pytest.mark.parametrize(("count", "level"), [(1, "note"), (20, "look"), (80, "bad")])
def test_skipped_spikes_by_their_share(tmp_path: Path, count: int, level: str) -> None:
    rows = healthy_rows(1000, 1)
    for row in [row for row in rows if "loss" in row][500 : 500 + count]:
        row["skipped"] = "loss 9 is over 6 sigma above its mean 2 of 128 steps"
    title = f"{count} spike{'s' * (count > 1)} skipped"
    assert titles(tmp_path / "run", rows) == {title: level}


def test_a_nan_that_was_skipped_names_its_step(tmp_path: Path) -> None:
    rows = healthy_rows()
    next(row for row in rows if row["step"] == 600).update(loss=math.nan, skipped="loss is nan")
    flags = flags_of(read_run(write_run(tmp_path / "run", rows)))
    assert [flag.title for flag in flags] == ["Not finite", "1 spike skipped"]
    assert "600" in flags[0].detail and flags[0].level == "look"


def test_a_failed_save_until_one_succeeds(tmp_path: Path) -> None:
    rows = healthy_rows()
    failed = {"step": 1000, "save_failed": "No space left on device"}
    assert titles(tmp_path / "last", [*rows, failed]) == {"A checkpoint could not be saved": "bad"}
    assert titles(tmp_path / "earlier", [failed | {"step": 450}, *rows]) == {"A checkpoint could not be saved": "note"}


def test_flags_say_what_to_do_and_the_worst_is_first(tmp_path: Path) -> None:
    rows = healthy_rows(change=late("grad_norm", 25.0))
    rows[3]["skipped"] = "loss is nan"
    flags = flags_of(read_run(write_run(tmp_path / "run", rows)))
    assert [flag.level for flag in flags] == ["bad", "look", "note"]
    assert all(len(flag.advice) > 40 and len(flag.detail) > 20 for flag in flags)


def test_without_a_configuration_the_number_of_experts_is_unknown(tmp_path: Path) -> None:
    found = titles(tmp_path / "run", healthy_rows(change=late("unused_experts", [0.0, 0.75, 0.0, 0.0])), model=None)
    assert found == {"Collapsed experts": "bad"}


def test_a_loss_that_is_not_finite_without_any_norm(tmp_path: Path) -> None:
    rows: list[Row] = [{"step": step, "loss": None} for step in (1, 2)]
    assert titles(tmp_path / "run", rows) == {"Not finite, and still so": "bad"}
