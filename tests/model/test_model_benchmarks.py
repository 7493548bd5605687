"""The model's benchmarks run at small sizes, compare like with like, and say what they measured."""

import argparse
import importlib

import pytest


def run(name: str, *options: str) -> dict:
    module = importlib.import_module(f"launch.benchmarks.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(["--device", "cpu", "--repeats", "1", *options]))["rows"]


def test_attention(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--length", "96", "--heads", "4", "--key_value_heads", "2", "--documents", "3"]
    rows = run("attention", "--dtype", "float32", *sizes)
    assert {"eager", "sdpa", "flash: cpu", "flash: cpu, documents", "transformers GPT-OSS (eager)"} <= set(rows)
    assert all(row.get("worst_error", 0) < 1e-4 for row in rows.values())  # all compute the same thing
    assert rows["flash: cpu"]["peak_mb"] < rows["eager"]["peak_mb"]
    assert "x eager" in capsys.readouterr().out


def test_loss() -> None:
    rows = run("loss", "--tokens", "2048", "--hidden", "32", "--vocabulary", "3000", "--dtype", "float32")
    assert rows["ours"]["gradient_difference"] < 1e-4
    assert rows["ours"]["memory_over_plain"] < 0.25
    assert rows["ours with z-loss"]["gradient_difference"] > 1e-4  # it is another loss


def test_moe() -> None:
    rows = run("moe", "--model", "tiny", "--tokens", "64", "--dtype", "float32")
    assert all(row["difference"] < 1e-5 for row in rows.values())
    assert set(rows) == {"ours", "transformers (loop)", "transformers (grouped_mm)"}


def test_generate() -> None:
    rows = run("generate", "--dtype", "float32", "--prompt_tokens", "8", "--batch_size", "1", "2", "--new_tokens", "3")
    assert [row["batch_size"] for row in rows] == [1, 2]
    names = {"ours", "ours with sinks", "transformers (grouped_mm)", "transformers (eager)"}
    assert all(names <= set(row) and row["ratio"] > 0 for row in rows)
