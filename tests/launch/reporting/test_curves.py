"""Fewer points and every spike: buckets against plain loops over their rows."""

from __future__ import annotations

import base64
import math
from pathlib import Path

import numpy as np
from made_up_runs import TOKENS, healthy_rows, write_run

from launch.reporting.curves import bucket_starts, curves_of, summarize, summarize_layers, training_hours
from launch.reporting.heat_map import heat_maps_of, pack
from launch.reporting.read import read_run


def test_buckets_cover_all_rows_once() -> None:
    for rows, points in ((1, 5), (5, 5), (7, 3), (1000, 999), (100_000, 1000)):
        starts = bucket_starts(rows, points)
        assert starts[0] == 0 and len(starts) == min(rows, points) and np.all(np.diff(starts) >= 1)
        sizes = np.diff([*starts, rows])
        assert sizes.max() - sizes.min() <= 1


def test_a_spike_survives_and_nan_does_not_spread() -> None:
    column = np.sin(np.arange(10_000) / 300)
    column[[1234, 5000]] = 50.0, math.nan
    starts = bucket_starts(len(column), 100)
    found = summarize(column, starts)
    for number, (a, b) in enumerate(zip(starts, [*starts[1:], len(column)], strict=True)):
        part = [x for x in column[a:b].tolist() if math.isfinite(x)]
        for name, value in (("y", math.fsum(part) / len(part)), ("lo", min(part)), ("hi", max(part))):
            assert math.isclose(found[name][number], value, rel_tol=1e-4), (name, number)
    assert max(found["hi"]) == 50.0


def test_a_bucket_without_a_number_is_a_gap() -> None:
    column = np.array([1.0, 2.0, math.nan, math.nan, math.inf, 3.0])
    found = summarize(column, bucket_starts(6, 3))
    assert found == {"y": [1.5, None, 3.0], "lo": [1.0, None, 3.0], "hi": [2.0, None, 3.0]}


def test_layers_are_their_median_between_the_extremes() -> None:
    column_NY = np.array([[1.0, 5.0, 3.0], [math.nan, 4.0, 2.0], [math.nan] * 3, [0.0, 9.0, 1.0]])
    found = summarize_layers(column_NY, bucket_starts(4, 4))
    assert found == {"y": [3.0, 3.0, None, 1.0], "lo": [1.0, 2.0, None, 0.0], "hi": [5.0, 4.0, None, 9.0]}


def test_hours_are_tokens_over_throughput(tmp_path: Path) -> None:
    def change(row: dict) -> None:
        row["tokens_per_second"] = 1000.0 if row["step"] <= 500 else 2000.0

    run = read_run(write_run(tmp_path / "run", healthy_rows(1000, 10, change)))
    hours = training_hours(run.train)
    assert math.isclose(hours[-1], (500 * TOKENS / 1000 + 500 * TOKENS / 2000) / 3600)
    assert np.all(np.diff(hours) > 0)


def test_what_the_page_gets(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    found = curves_of(run, 50)
    assert all(len(axis) == 50 for axis in found["axis"].values()) and found["axis"]["step"][-1] == 1000
    assert all(len(part) == 50 for curve in found["curves"].values() for part in curve.values())
    assert {"loss", "grad_norm", "lr", "mfu", "max_vio", "load_entropy"} <= set(found["curves"])
    assert not {"step", "tokens", "load_max_over_mean"} & set(found["curves"])
    assert found["points"]["val_loss"]["step"] == list(range(100, 1001, 100))
    ratio = run.train.layers["load_max_over_mean"]
    assert math.isclose(found["curves"]["max_vio"]["hi"][0], float(ratio[:4].max()) - 1, rel_tol=1e-4)


def test_numbers_of_evaluations_and_snapshots_are_points(tmp_path: Path) -> None:
    rows = [*healthy_rows(), {"step": 40, "expert_load": [[1, 2]], "update_to_weight": {"decay": 1e-3, "no_decay": None}}]
    rows += [{"step": 60, "eval/python_loss": 1.5}, {"step": 1000, "val_loss": 2.0, "attention_sink_mass": [0.1, 0.4, 0.2]}]
    points = curves_of(read_run(write_run(tmp_path / "run", rows)), 50)["points"]
    assert points["update_to_weight: decay"] == {"step": [40], "y": [1e-3]}
    assert points["eval/python_loss"] == {"step": [60], "y": [1.5]} and points["attention_sink_mass"] == {
        "step": [1000],
        "y": [0.2],
    }
    assert points["val_loss"]["y"][-1] == 2.0 and set(points) == {
        "val_loss", "val_bits_per_byte", "attention_sink_mass", "update_to_weight: decay", "eval/python_loss",
        "save_seconds",
    }  # fmt: skip


def test_saves_and_experts_of_any_number_of_ranks_are_points(tmp_path: Path) -> None:
    rows = [
        {"step": 5, "update_to_weight": {"ep_size_8": 2e-3}},
        {"step": 10, "save_seconds": 0.5},
        {"step": 20, "save_seconds": 0.7},
    ]
    points = curves_of(read_run(write_run(tmp_path / "run", rows)), 50)["points"]
    assert points["update_to_weight: experts"] == {"step": [5], "y": [2e-3]}
    assert points["save_seconds"] == {"step": [10, 20], "y": [0.5, 0.7]}


def test_a_skipped_step_is_in_the_mean_of_no_step_that_was_taken(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step), "max_vio": [1.0]} for step in range(1, 7)]
    for row in (rows[1], rows[4], rows[5]):
        row.update(loss=100.0, skipped="a spike")
    run = read_run(write_run(tmp_path / "run", rows))
    found = curves_of(run, 3)
    assert found["curves"]["loss"] == {"y": [1.0, 3.5, 100.0], "lo": [1.0, 3.0, 100.0], "hi": [100.0, 4.0, 100.0]}
    assert found["skipped"] == [2] and curves_of(run, 6)["skipped"] == [1, 4, 5]


def test_a_table_with_a_cell_that_is_no_number_is_still_a_map(tmp_path: Path) -> None:
    rows = [
        *healthy_rows(every=50),
        *({"step": s, "expert_load": load} for s, load in ((10, [["a"]]), (20, [[1, 2], [{"a": 1}, 2]]))),
    ]
    found = heat_maps_of(read_run(write_run(tmp_path / "run", rows)))["expert_load"]
    assert (found["rows"], found["columns"], found["steps"]) == (4, 1, [20])


def test_a_cell_is_within_a_255th_of_its_number() -> None:
    cells = np.random.default_rng(0).normal(size=(7, 11))
    cells[3, 4] = math.nan
    packed = pack(cells, np.arange(11))
    bytes_ = np.frombuffer(base64.b64decode(packed["data"]), np.uint8).reshape(7, 11)
    assert bytes_[3, 4] == 255
    read = packed["lo"] + (packed["hi"] - packed["lo"]) * bytes_ / 254
    off = np.abs(read - cells)
    off[3, 4] = 0
    assert off.max() <= (packed["hi"] - packed["lo"]) / 508 * 1.0001


def test_a_map_of_one_value_has_no_range_to_divide_by() -> None:
    packed = pack(np.full((2, 3), 0.5), np.arange(3))
    assert packed["lo"] == packed["hi"] == 0.5


def test_expert_load_is_a_share_of_the_fair_one(tmp_path: Path) -> None:
    rows = healthy_rows()
    for step in (100, 200):
        rows.append({"step": step, "expert_load": [[10, 30, 20, 20], [80, 0, 0, 0]]})
    found = heat_maps_of(read_run(write_run(tmp_path / "run", rows)))["expert_load"]
    bytes_ = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(8, 2)
    values = found["lo"] + (found["hi"] - found["lo"]) * bytes_ / 254
    assert found["experts"] == 4 and found["steps"] == [100, 200]
    np.testing.assert_allclose(values[:, 0], [0.5, 1.5, 1, 1, 4, 0, 0, 0], atol=4 / 254)
    assert (found["layers"], found["merged"]) == (2, 1)


def test_more_experts_than_rows_are_merged_and_a_dead_one_still_shows(tmp_path: Path) -> None:
    """From 7,501 layers x experts on the map was left out of the page without a word."""
    load_YE = np.full((3, 22), 10.0)
    load_YE[1, 9], load_YE[2, 20] = 0, 30  # in the third group of four, and in the last, of two
    tables = [load_YE.copy() for _ in range(20)]
    for step, table_YE in enumerate(tables):  # one in turn without a token: a mean over the column's steps of each is not dark
        table_YE[0, step % 2] = 0
    rows = [*healthy_rows(), *({"step": 10 * i, "expert_load": t.tolist()} for i, t in enumerate(tables, 1))]
    found = heat_maps_of(read_run(write_run(tmp_path / "run", rows)), cells=10 * 3 * 2 * 6)["expert_load"]
    assert {k: found[k] for k in ("layers", "experts", "merged", "rows", "columns")} == {
        "layers": 3, "experts": 22, "merged": 4, "rows": 3 * 2 * 6, "columns": 10
    }  # fmt: skip
    bytes_ = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(3, 6, 2, 10)
    values = found["lo"] + (found["hi"] - found["lo"]) * bytes_ / 254
    share = load_YE / load_YE.mean(axis=1, keepdims=True)
    expected = np.array([[[f(share[y, g : g + 4]) for f in (min, max)] for g in range(0, 22, 4)] for y in (1, 2)])
    np.testing.assert_allclose(values[1:], np.repeat(expected[..., None], 10, axis=3), atol=3 / 254)
    assert values[1, 2, 0].max() == 0 and values[0, 0, 0].min() > 0.5
    whole = heat_maps_of(read_run(tmp_path / "run"), cells=3 * 2 * 8)["expert_load"]
    assert (whole["merged"], whole["rows"]) == (22, 6)
    assert "expert_load" not in heat_maps_of(read_run(tmp_path / "run"), cells=3 * 2 * 8 - 1)
