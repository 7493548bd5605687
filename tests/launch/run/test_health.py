"""Router and step health: formulas on loads counted by hand, windows, what happens at skipped steps, the trainer's own rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.run.health import Health, perplexity, violations

pytestmark = pytest.mark.usefixtures("one_rank")


def test_violations_by_hand() -> None:
    load_YE = torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0], [5, 10, 20, 5], [0, 0, 0, 0]])
    most, least = violations(load_YE)
    assert most == [0.0, 3.0, 1.0, 0.0] and least == [0.0, 1.0, 0.5, 0.0]


def test_perplexity_has_no_limit() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7) and perplexity(1e6) == math.inf and math.isnan(perplexity(math.nan))


def take(health: Health, steps: int) -> dict:
    return health.take(loss=1.0, seconds=6.0, steps=steps, memory=3e9, device=torch.device("cpu"))


def test_a_window_sees_what_lasts_and_a_row_the_step() -> None:
    """Two steps that are uneven in opposite ways are even together."""
    health = Health(clip=1.0, interval=0)
    health.count_step(0.5, torch.tensor([[30, 10]]))
    health.count_step(1.5, torch.tensor([[10, 30]]))
    row = take(health, 2)
    assert row["max_vio"] == [0.5] and row["max_vio_window"] == [0.0]
    assert (row["clipped_share"], row["step_seconds"], row["memory_gb"]) == (0.5, 3.0, 3.0)
    health.count_step(1.5, torch.tensor([[40, 0]]))
    row = take(health, 1)
    assert row["max_vio_window"] == [1.0] and row["min_vio"] == [1.0] and row["clipped_share"] == 1.0


def test_the_window_keeps_its_own_copy() -> None:
    health, load_YE = Health(clip=0.0, interval=0), torch.tensor([[30, 10]])
    health.count_step(9.0, load_YE)
    load_YE.zero_()
    row = take(health, 1)
    assert row["max_vio_window"] == [0.5] and "clipped_share" not in row


def test_a_skipped_step_has_no_load_of_its_own() -> None:
    health = Health(clip=1.0, interval=0)
    health.count_step(0.5, torch.tensor([[30, 10]]))
    health.skip_step()
    row = take(health, 2)
    assert "max_vio" not in row and row["max_vio_window"] == [0.5]
    assert "max_vio_window" not in take(health, 1)


def test_snapshots_come_at_their_interval() -> None:
    assert [step for step in range(1, 10) if Health(clip=0, interval=4).is_detailed(step)] == [4, 8]
    assert not any(Health(clip=0, interval=0).is_detailed(step) for step in range(10))


def test_memory_and_waiting_are_of_the_rank_that_has_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of all together: another rank with 2 GB, which waited for 6 s of the two steps."""

    def with_another(worst: torch.Tensor, op: object) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        worst.copy_(worst.maximum(torch.tensor([2.0, 6.0], dtype=worst.dtype)))

    monkeypatch.setattr("launch.run.health.dist.all_reduce", with_another)
    row = take(Health(clip=0.0, interval=0, data_seconds=4.0), 2)
    assert (row["memory_gb"], row["data_seconds"]) == (3.0, 3.0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_logs_them(tmp_path: Path, small_shards: Path, small_model: Path, forked_train: Callable, ranks: int) -> None:
    """Two ranks with experts on both: loads are summed over ranks, and each group's ratio is that of all its parts."""
    run = tmp_path / "run"
    done = forked_train(
        ranks, "--data", small_shards, "--output", run, "--model", small_model, "--sequence_length", 64, "--max_steps", 6,
        "--deepspeed_config", f"ds_configs/cpu_ep{ranks}_zero2.json", "--log_interval", 3, "--eval_interval", 3,
        "--eval_batches", 1, "--health_interval", 3, "--tracker", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    snapshots = [row for row in rows if "expert_load" in row]
    assert [row["step"] for row in training] == [row["step"] for row in snapshots] == [3, 6]
    batch = json.loads((run / "config.json").read_text())["global_batch"]
    for row, snapshot in zip(training, snapshots, strict=True):
        load_YE = torch.tensor(snapshot["expert_load"])
        assert load_YE.shape == (2, 8) and load_YE.sum(dim=1).tolist() == [batch * 64 * 2] * 2  # top 2
        most, least = violations(load_YE)
        assert row["max_vio"] == most and row["min_vio"] == least
        assert row["max_vio"] == pytest.approx([x - 1 for x in row["load_max_over_mean"]])
        assert len(row["max_vio_window"]) == 2 and row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert 0 < row["memory_gb"] < 10 and 0 <= row["data_seconds"] < row["step_seconds"]
        assert all(1e-6 < ratio < 1 for ratio in snapshot["update_to_weight"].values())
        assert {"decay", "no_decay"} <= set(snapshot["update_to_weight"])
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert all(len(row["attention_sink_mass"]) == 2 and 0 < min(row["attention_sink_mass"]) < 1 for row in evaluations)
    assert not (run / "wandb").exists()
