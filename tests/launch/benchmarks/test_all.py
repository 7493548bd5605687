"""`benchmark.py all`: every benchmark has its share of the time, one that fails or lasts too long does not end the others."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import launch.benchmark
from data.cli import UserError
from launch.benchmarks import all as every


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    every.add_arguments(parser)
    return parser.parse_args(flags)


def test_time_is_divided_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"loss": "", "moe": "", "data": "", "all": ""}
    monkeypatch.setattr(launch.benchmark, "BENCHMARKS", names)
    shares = []

    def run_one(command: list[str], timeout: float, check: bool) -> Any:
        shares.append(timeout)
        if command[2] == "loss":
            time.sleep(0.4)
            raise subprocess.TimeoutExpired(command, timeout)
        if command[2] == "moe":
            return subprocess.CompletedProcess(command, 3)
        Path(command[-1]).write_text(json.dumps({"rows": 7}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run_one)
    results = every.run(arguments("--budget", "3s"))
    assert results["loss"]["reason"] == "not done after its share of 1 s" and results["moe"]["reason"] == "exit code 3"
    assert results["data"]["result"] == {"rows": 7}
    assert shares[0] == pytest.approx(1.0, abs=0.1) and shares[1] == pytest.approx(1.3, abs=0.1)
    assert shares[2] == pytest.approx(2.6, abs=0.2)  # what the one before did not use


def test_what_needs_input_is_left_out_and_a_wrong_name_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(every.needs_input(name) for name in ("loss", "growth", "data", "preprocess"))
    monkeypatch.setattr(every, "needs_input", lambda name: True)
    assert every.run(arguments("--only", "loss")) == {"loss": {"reason": "needs input of its own"}}
    with pytest.raises(UserError, match="--only los: no such benchmark"):
        every.run(arguments("--only", "los"))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("0.5h", 1800)])
def test_a_budget(text: str, seconds: float) -> None:
    assert arguments("--budget", text).budget == seconds
    with pytest.raises(argparse.ArgumentTypeError, match="is no time such as"):
        every.budget("ten minutes")


def test_the_sizes_for_a_cpu_are_flags_that_exist() -> None:
    for name, flags in every.SHORT.items():
        parser = argparse.ArgumentParser()
        __import__(f"launch.benchmarks.{name}")
        sys.modules[f"launch.benchmarks.{name}"].add_arguments(parser)
        parser.parse_args(flags)
