"""`--eval_tasks`: measured by name at every evaluation, and without any trace in the training itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import metrics

SHORT = ("--max_steps", 4, "--sequence_length", 64, "--log_interval", 1, "--eval_interval", 2, "--eval_batches", 2)
TRAINED = ("step", "samples", "loss", "grad_norm", "lr", "load_max_over_mean", "val_loss", "val_bits_per_byte")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_is_bit_equal_with_and_without(
    ranks: int, forked_train, small_shards: Path, small_model: Path, tmp_path: Path
) -> None:
    rows = {}
    for name, more in (("off", ()), ("on", ("--eval_tasks", f"held_out={small_shards}", f"again={small_shards}"))):
        flags = ("--data", small_shards, "--model", small_model, "--output", tmp_path / name, "--wandb", "disabled", *SHORT)
        done = forked_train(ranks, *flags, *more)
        assert done.returncode == 0, done.stderr[-3000:]
        rows[name] = metrics(tmp_path / name)
    tasks = [row for row in rows["on"] if "eval/held_out_loss" in row]
    rows["on"] = [row for row in rows["on"] if "eval/held_out_loss" not in row]
    for off, on in zip(rows["off"], rows["on"], strict=True):
        assert {key: off.get(key) for key in TRAINED} == {key: on.get(key) for key in TRAINED}
    # The tasks are the validation split itself here: their figures are known.
    validated = [row for row in rows["on"] if "val_loss" in row]
    assert [row["step"] for row in tasks] == [row["step"] for row in validated] == [0, 2, 4]
    for task, row in zip(tasks, validated, strict=True):
        assert task["eval/held_out_loss"] == task["eval/again_loss"] == row["val_loss"]
        assert task["eval/held_out_bits_per_byte"] == row["val_bits_per_byte"]


def test_mistakes_are_one_sentence(forked_train, small_shards: Path, small_model: Path, tmp_path: Path) -> None:
    flags = ("--data", small_shards, "--model", small_model, "--output", tmp_path / "run", *SHORT)
    for given, sentence in (
        ((small_shards,), "give NAME=PATH"),
        ((f"a={small_shards}", f"a={small_shards}"), "each name once"),
        (("a=nowhere",), "no shards at nowhere"),
    ):
        done = forked_train(1, *flags, "--eval_tasks", *given)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
