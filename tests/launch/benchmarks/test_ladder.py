"""`launch/benchmark.py ladder`: a known law comes back, what was not seen is predicted, the planner reads what was written."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT

from data.cli import UserError
from launch.benchmarks import ladder
from launch.benchmarks.scaling_law import bootstrap, fit
from launch.benchmarks.small_runs import SmallRun
from launch.planning.ladder import Ladder, Law, active_parameters, in_words
from model import MoEGPTConfig

CHINCHILLA = Law(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28)
SIZES, TOKENS = (1e6, 3e6, 1e7, 3e7), (2e7, 6e7, 2e8, 6e8)


def points(noise: float) -> list[tuple[float, float, float]]:
    random = np.random.default_rng(0)
    return [(n, d, CHINCHILLA.bits(n, d) * float(np.exp(noise * random.normal()))) for n in SIZES for d in TOKENS]


def test_a_known_law_comes_back() -> None:
    found = fit(points(0.0))
    assert found.to_json() == pytest.approx(CHINCHILLA.to_json(), rel=1e-3)
    assert found.bits(1e9, 1e10) == pytest.approx(CHINCHILLA.bits(1e9, 1e10), rel=1e-5)


def test_the_truth_lies_in_the_interval_which_widens_with_distance() -> None:
    seen = points(0.003)
    law = fit(seen)
    largest = {"active": 3e7, "tokens": 6e8}
    made = Ladder(law=law, bootstrap=bootstrap(seen, law, draws=30), largest=largest, held_out_error=None, preferred=None)
    near, far = made.expectation(3e7, 6e8, 1.0), made.expectation(3e9, 6e10, 1.0)
    assert far["low"] < CHINCHILLA.bits(3e9, 6e10) < far["high"]
    assert far["high"] - far["low"] > 3 * (near["high"] - near["low"]) > 0
    assert far["beyond"] == pytest.approx({"parameters": 100, "tokens": 100})


@pytest.mark.parametrize(("error", "floor", "doubts"), [(0.019, 0.5, 0), (None, 0.5, 0), (0.037, 0.5, 1), (0.037, 1e-10, 2)])
def test_a_law_that_predicts_nothing_says_so(error: float | None, floor: float, doubts: int) -> None:
    law = replace(CHINCHILLA, E=floor)
    made = Ladder(law=law, bootstrap=[law], largest={"active": 1e6, "tokens": 1e6}, held_out_error=error, preferred=None)
    said = in_words(made.expectation(1e9, 1e9, 1.0), tokens=1e9)
    assert sum(line.startswith("not to be believed") for line in said) == doubts == len(said) - 1


def test_sizes_that_do_not_matter_make_no_prediction() -> None:
    """Measured: at 0.8 M tokens wider models are behind. The exponent of the size is then beyond sense, not beyond a float."""
    rows = {185e3: (2.308, 2.033, 1.850), 356e3: (2.367, 2.011, 1.815), 616e3: (2.390, 2.021, 1.811)}
    seen = [(n, d, loss) for n, row in rows.items() for d, loss in zip((8e5, 1.6e6, 3.2e6), row, strict=True)]
    law = fit(seen)
    laws = bootstrap(seen, law, draws=20)
    assert laws and all(np.isfinite(list(one.to_json().values())).all() for one in (law, *laws))
    largest = {"active": 1e6, "tokens": 3.2e6}
    found = Ladder(law=law, bootstrap=laws, largest=largest, held_out_error=0.01, preferred=None).expectation(4e8, 2e10, 1.0)
    assert np.isfinite([found["low"], found["high"]]).all()
    assert any("exponent of the parameters" in doubt for doubt in found["doubts"])
    assert replace(CHINCHILLA, A=1e300, alpha=-400.0).bits(1e9, 1e9) > 1e300


def test_too_few_losses_make_no_law() -> None:
    with pytest.raises(ValueError, match="five losses"):
        fit([(1e6, 1e7, 3.0), (2e6, 1e7, 2.9)])


def test_the_family_has_the_shape_of_800m() -> None:
    large = ladder.family(1536, 49_152, 2048, head_dim=64).to_dict()
    differs = {name for name, value in MoEGPTConfig.preset("800m").to_dict().items() if large[name] != value}
    assert differs <= {"rope_parameters", "router_bias_rate"}
    assert [ladder.family(h, 512, 64, head_dim=64).num_key_value_heads for h in (64, 128, 192, 256, 384)] == [1, 1, 1, 1, 2]
    with pytest.raises(UserError, match="--hidden 100 must be a multiple of 32"):
        ladder.family(100, 512, 64, head_dim=32)
    with pytest.raises(UserError, match="--head_dim 15 must be even"):
        ladder.family(60, 512, 64, head_dim=15)


def test_the_smallest_member_has_two_layers() -> None:
    smallest = parse("--data", "x")
    assert ladder.family(min(smallest.hidden), 512, 64, head_dim=smallest.head_dim).num_hidden_layers == 2


def parse(*flags: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ladder.add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def test_a_ladder_of_a_known_law(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training replaced by the law, with a learning rate and a batch that it likes best: all else as the command does it."""
    truth, trained = Law(A=60.0, B=80.0, E=0.6, alpha=0.3, beta=0.3), []

    def result(one: SmallRun) -> dict[str, Any]:
        tokens = one.steps * one.deepspeed["train_batch_size"] * one.sequence_length
        rate = one.deepspeed["optimizer"]["params"]["lr"]
        return {"bits": [9.0, truth.bits(one.active, tokens) + 0.01 * abs(np.log(rate / 0.004))]}

    monkeypatch.setattr(SmallRun, "train", lambda one, stop_after: trained.append((one.folder, stop_after)))
    monkeypatch.setattr(SmallRun, "result", result)
    flags = ["--data", small_shards, "--hidden", 64, 128, 192, 256, "--held_out", 256, "--tokens", 409600, 819200, 1638400]
    flags += ["--deepspeed_config", ROOT / "ds_configs/cpu_ep1_zero2.json", "--learning_rates", 0.002, 0.004, 0.008]
    found = ladder.run(parse(*flags, "--draws", 10, "--folder", tmp_path / "runs"))
    assert len(trained) == 4 * 3 + 3 and len({folder for folder, _ in trained}) == len(trained)
    assert found["held_out_error"] < 0.002
    assert found["preferred"]["learning_rate"] == 0.004
    (tmp_path / "l.json").write_text(json.dumps(found))
    check_the_plan(tmp_path / "l.json")


def test_a_width_trains_at_its_own_rate_beside_the_runs_at_one_rate(small_shards: Path, tmp_path: Path) -> None:
    flags = ["--data", small_shards, "--hidden", 64, 128, 256, "--tokens", 409600, 819200, "--folder", tmp_path]
    flags += ["--deepspeed_config", ROOT / "ds_configs/cpu_ep1_zero2.json"]  # at 0.002
    same, scaled = ladder.plan_runs(parse(*flags)), ladder.plan_runs(parse(*flags, "--rate_exponent", 1))
    rates = {hidden: one.deepspeed["optimizer"]["params"]["lr"] for (hidden, _), one in scaled.items()}
    assert rates == {64: 0.002, 128: 0.001, 256: 0.0005}
    assert {one.deepspeed["optimizer"]["params"]["lr"] for one in same.values()} == {0.002}
    assert len({one.folder for one in (*same.values(), *scaled.values())}) == 12
    without = tmp_path / "without.json"
    without.write_text(json.dumps({"train_batch_size": 16, "optimizer": {"type": "AdamW", "params": {}}}))
    with pytest.raises(UserError, match=r"--rate_exponent needs optimizer\.params\.lr"):
        ladder.plan_runs(parse(*flags[:-1], without, "--rate_exponent", 1))


def check_the_plan(path: Path) -> None:
    """`launch/plan.py --ladder` says what the file says."""
    command = [sys.executable, "launch/plan.py", "--model", "800m", "--gpu", "h100-80gb", "--tokens", "2e10", "--ladder", str(path)]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    said, read = json.loads(done.stdout)["expected"], Ladder.read(path)
    active = active_parameters(MoEGPTConfig.preset("800m"))
    assert said["active"] == active and said["bits_per_byte"] == pytest.approx(read.law.bits(active, 2e10))
    assert said["low"] < said["bits_per_byte"] < said["high"]
    assert read.preferred is not None and said["learning_rate"] < read.preferred["learning_rate"]
    assert said["batch_tokens"] > read.preferred["batch_tokens"]
    words = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{said['bits_per_byte']:.3f} bits per byte, {said['low']:.3f} to {said['high']:.3f}" in words
    without = subprocess.run(command[:6] + command[8:], cwd=ROOT, capture_output=True, text=True, check=False)
    assert without.returncode == 2 and "--ladder needs --tokens" in without.stderr


def test_what_cannot_be_a_ladder_is_said(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text("{}")
    with pytest.raises(UserError, match="is not what launch/benchmark"):
        Ladder.read(tmp_path / "l.json")
    with pytest.raises(UserError, match="is not a file"):
        Ladder.read(tmp_path / "none.json")
    with pytest.raises(UserError, match="two widths, two token counts and five runs"):
        ladder.check(parse("--data", "x", "--hidden", 64, 128, "--held_out", 128))
    with pytest.raises(UserError, match="must be one of --hidden 64 128"):
        ladder.check(parse("--data", "x", "--hidden", 64, 128, "--held_out", 192))


@pytest.mark.slow
def test_a_real_ladder_of_seconds(small_shards: Path, tmp_path: Path) -> None:
    """Six runs of a few steps: too short for a law that says anything, long enough for every part to have run."""
    command = [sys.executable, "launch/benchmark.py", "ladder", "--data", small_shards, "--output", tmp_path / "l.json"]
    command += ["--hidden", 64, 128, "--tokens", 4096, 8192, 16384, "--sequence_length", 64, "--eval_batches", 1]
    command += ["--draws", 5, "--folder", tmp_path / "runs"]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "l.json").read_text())
    assert len(found["points"]) == 6 and Ladder.read(tmp_path / "l.json").largest["tokens"] == 16384
    by_size = [point["bits"] for point in found["points"] if point["hidden"] == 128]
    assert by_size == sorted(by_size, reverse=True)
