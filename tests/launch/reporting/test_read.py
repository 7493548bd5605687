"""`metrics.jsonl` is read as it is: half lines, repeated steps, NaN, keys that come and go."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import healthy_rows, training_row, write_run

from data.cli import UserError
from launch.reporting.columns import MOST_NAMES, join, to_columns, to_table
from launch.reporting.read import BLOCK, MOST_TABLES, read_run


def test_columns_are_the_rows(tmp_path: Path) -> None:
    rows = healthy_rows()
    run = read_run(write_run(tmp_path / "run", rows))
    training = [row for row in rows if "loss" in row]
    assert run.train.steps.tolist() == [row["step"] for row in training]
    assert run.train.scalars["loss"].tolist() == [row["loss"] for row in training]
    assert run.train.layers["load_entropy"].tolist() == [row["load_entropy"] for row in training]
    assert [row["step"] for row in run.evaluations] == list(range(100, 1001, 100))
    assert {mark.kind for mark in run.marks} == {"checkpoint"} and run.damaged == 0


def test_more_lines_than_a_block(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 2 * BLOCK + 10)]
    run = read_run(write_run(tmp_path / "run", rows))
    assert len(run.train) == len(rows) and run.train.scalars["loss"][-1] == len(rows)


def test_half_a_line_and_other_rubbish_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\n[1]\n"text"\n{"no": "step"}\n\xff\xfe\n{"step": true, "loss": 1}\n{"step": 1005, "lo')
    run = read_run(folder)
    assert run.damaged == 6 and run.last_step == 1000


def test_hostile_lines_are_rubbish_too(tmp_path: Path) -> None:
    """Nested a million deep, numbers beyond a machine's, a name for every row."""
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("[" * 10**6 + f'\n{{"step": {10**400}, "loss": 1}}\n{{"step": 1001, "loss": {10**400}, "samples": "x"}}\n')
        file.writelines(json.dumps({"step": 1002 + i, "loss": 1.0, f"name {i}": 1.0}) + "\n" for i in range(MOST_NAMES))
    run = read_run(folder)
    assert run.damaged == 2 and run.last_step == 1001 + MOST_NAMES and len(run.train.scalars) <= MOST_NAMES
    assert math.isnan(run.train.scalars["loss"][run.train.steps == 1001][0])


def test_a_restart_repeats_steps_and_the_last_try_counts(tmp_path: Path) -> None:
    first = [{"step": s, "samples": s, "loss": 9.0} for s in range(1, 121)]
    second = [{"step": s, "samples": s, "loss": 1.0} for s in range(101, 201)]
    run = read_run(write_run(tmp_path / "run", [*first, *second]))
    assert run.train.steps.tolist() == list(range(1, 201))
    assert run.train.scalars["loss"].tolist() == [9.0] * 100 + [1.0] * 100
    assert [(mark.kind, mark.step) for mark in run.marks] == [("restart", 101)]


def test_rows_that_a_resumed_run_moved_away(tmp_path: Path) -> None:
    """As launch/run/metrics.py keeps them: what is written again leaves metrics.jsonl, and a row says that the run was resumed."""
    rows = [{"step": s, "samples": s, "loss": 1.0} for s in range(1, 201)]
    folder = write_run(tmp_path / "run", [*rows[:100], {"step": 100, "resumed": "from step_100"}, *rows[100:]])
    away = [{"step": s, "loss": 9.0} for s in range(101, 121)]
    away[3]["skipped"] = "loss is nan"
    (folder / "metrics.superseded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in away) + '{"half')
    run = read_run(folder)
    assert run.train.steps.tolist() == list(range(1, 201)) and set(run.train.scalars["loss"]) == {1.0}
    assert [(mark.kind, mark.step) for mark in run.marks] == [("restart", 100), ("skipped", 104)] and run.damaged == 1


def test_a_rollback_goes_on_with_the_data(tmp_path: Path) -> None:
    first = [{"step": s, "samples": s, "loss": 9.0} for s in range(1, 121)]
    second = [{"step": s - 20, "samples": s, "loss": 1.0} for s in range(121, 201)]
    run = read_run(write_run(tmp_path / "run", [*first, *second]))
    assert [(mark.kind, mark.step) for mark in run.marks] == [("rollback", 101)]


@pytest.mark.parametrize("in_order", [True, False], ids=["skipped, then back", "back, then skipped"])
def test_what_was_measured_of_abandoned_steps_is_not_counted(tmp_path: Path, in_order: bool) -> None:
    """Back to step 80 after step 120. Runs of before the step that asked for it was logged first gave its row the step that they
    went back to, and evaluated there again. A rollback can be seen at the first row that is logged after it."""
    rows = [{"step": s, "samples": s, "loss": 2.0} for s in range(10, 120, 10)]
    for at, loss in ((120, 9.0), (100, 9.0), (80, 2.1), (40, 2.2)):
        rows.insert(at // 10, {"step": at, "val_loss": loss})
        rows.insert(at // 10, {"step": at, "expert_load": [[loss]]})
    rows.append({"step": 120 if in_order else 80, "samples": 120, "loss": 9.0, "skipped": "a spike"})
    rows += [] if in_order else [{"step": 80, "val_loss": 2.1}, {"step": 80, "expert_load": [[2.1]]}]
    run = read_run(write_run(tmp_path / "run", [*rows, {"step": 90, "samples": 130, "loss": 2.0}]))
    assert [(row["step"], row["val_loss"]) for row in run.evaluations] == [(40, 2.2), (80, 2.1)]
    assert [row["step"] for row in run.snapshots] == [40, 80]
    assert run.last_step == 90 and "rollback" in [mark.kind for mark in run.marks]


def test_evaluations_that_come_before_the_first_row_after_a_rollback(tmp_path: Path) -> None:
    """Evaluated more often than logged: the one of step 105 that was given up stood beside the new one."""
    rows: list[dict] = [{"step": s, "samples": s, "loss": 2.0} for s in range(10, 101, 10)]
    rows += [{"step": 105, "val_loss": 9.0}, {"step": 105, "expert_load": [[9.0]]}, {"step": 106, "expert_load": [[9.0]]}]
    rows += [{"step": 107, "samples": 107, "loss": 9.0, "skipped": "a spike"}]  # back to step 100
    rows += [{"step": 105, "val_loss": 2.1}, {"step": 105, "expert_load": [[2.0]]}, {"step": 105, "eval/code_pass@1": 0.5}]
    run = read_run(write_run(tmp_path / "run", rows))
    assert [(row["step"], row["val_loss"]) for row in run.evaluations] == [(105, 2.1)]
    (row,) = run.snapshots  # the map and the task of a step: the later hid the earlier
    assert row == {"step": 105, "expert_load": [[2.0]], "eval/code_pass@1": 0.5}


def test_of_very_many_snapshots_a_map_s_worth_of_tables_is_kept(tmp_path: Path) -> None:
    """All of them as lists took 7 GB for a million steps of 60 layers of 256 experts; `plan.py --from` held them too."""
    rows = [{"step": s, "expert_load": [[s, 1.5], [None, 0]], "update_to_weight": {"decay": s}} for s in range(1, 3 * MOST_TABLES)]
    run = read_run(write_run(tmp_path / "run", rows))
    assert len(run.snapshots) == len(rows) and all("update_to_weight" in row for row in run.snapshots)
    tables = {row["step"]: row["expert_load"] for row in run.snapshots if "expert_load" in row}
    assert list(tables) == [*range(1, 3 * MOST_TABLES, 4), 3 * MOST_TABLES - 1] and MOST_TABLES / 2 <= len(tables) <= MOST_TABLES
    for step, table_YE in tables.items():
        assert table_YE.dtype == np.float32
        np.testing.assert_array_equal(table_YE, [[step, 1.5], [math.nan, 0]])


@pytest.mark.parametrize("value", [[[[1, 2]]], [["1e"]], [["1.5"]], [[True]], [[10**400]], [[{}]]])
def test_a_table_s_cell_that_is_no_number_is_none(value: list) -> None:
    table_YE = to_table(value)
    assert table_YE is not None and table_YE.shape == (1, 1) and np.isnan(table_YE).all()
    assert all(to_table(other) is None for other in (value[0][0], [], [1], [[]], [[], []], [[1], [1, 2]], "text", None))


def test_skipped_steps_of_a_part_that_was_repeated_are_still_told(tmp_path: Path) -> None:
    rows = [{"step": s, "samples": s, "loss": 2.0} for s in range(1, 121)]
    rows[109] |= {"skipped": "loss is nan", "skipped_samples": [109, 110]}
    run = read_run(write_run(tmp_path / "run", [*rows, *({"step": s, "samples": s, "loss": 2.0} for s in range(101, 121))]))
    assert ("skipped", 110) in [(mark.kind, mark.step) for mark in run.marks]


@pytest.mark.parametrize("written", ["NaN", "null", '"nan"', "Infinity", '"inf"'])
def test_what_is_not_finite(tmp_path: Path, written: str) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {written}, "load_entropy": [1.0, null]}}\n')
    run = read_run(folder)
    assert not math.isfinite(run.train.scalars["loss"][0])
    assert math.isnan(run.train.layers["load_entropy"][0, 1])


def test_keys_that_come_and_go() -> None:
    early = to_columns([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "mfu": 0.4, "load_entropy": [0.9, 0.8]}])
    late = to_columns([{"step": 3, "loss": 1.0, "load_entropy": [0.7]}])  # another number of layers: not this run's
    both = join([early, late])
    assert np.isnan(both.scalars["mfu"]).tolist() == [True, False, True]
    assert (
        np.isnan(both.layers["load_entropy"]).all(axis=1).tolist() == [True, False, True]
        or both.layers["load_entropy"].shape[1] == 1
    )


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "first")
    with pytest.raises(UserError, match=r"runs is not a run's folder.*its runs: first"):
        read_run(tmp_path / "runs")


def test_a_run_without_a_step_or_a_configuration(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "config.json").write_text("{")
    run = read_run(folder)
    assert len(run.train) == 0 and run.last_step == 0 and run.config == {}


def test_evaluations_before_the_first_step(tmp_path: Path) -> None:
    import random

    rows = [{"step": 0, "val_loss": 8.3}, training_row(1, random.Random(0)), {"step": 0, "val_loss": 8.2}]
    run = read_run(write_run(tmp_path / "run", rows))
    assert [row["val_loss"] for row in run.evaluations] == [8.2]
