"""Warm-up, stable, decay: against its formula, with any length up to the decay, and in a run that goes on with another length."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.engine import schedules
from launch.engine.schedules import WarmupStableDecayLR
from launch.engine.settings import EngineSettings

PEAK = 0.5


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def rates(steps: int, **params: Any) -> list[float]:
    """What each step uses, the first one step 1: an engine steps its schedule after its optimizer."""
    schedule = WarmupStableDecayLR(optimizer(), **params)
    found = []
    for _ in range(steps):
        found.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("kind", "left"),
    [("linear", lambda p: 1 - p), ("sqrt", lambda p: 1 - p**0.5), ("cosine", lambda p: math.cos(math.pi * p / 2) ** 2)],
)
def test_the_formula(kind: str, left: Callable[[float], float]) -> None:
    found = rates(23, total_num_steps=20, warmup_num_steps=4, decay_num_steps=8, decay_type=kind, decay_min_ratio=0.1)
    warm_up = [0.0, 0.0, 0.25, 0.5, 0.75]  # DeepSpeed's: the first two steps are at its beginning
    decay = [0.1 + 0.9 * left(k / 8) for k in range(1, 9)]
    assert found == pytest.approx([PEAK * ratio for ratio in [*warm_up, *[1.0] * 8, *decay, 0.1, 0.1]])
    assert min(found[13:21]) == pytest.approx(0.1 * PEAK), "and it gets there"


def test_up_to_the_decay_nothing_depends_on_the_length() -> None:
    short, long = (rates(30, total_num_steps=total, warmup_num_steps=4, decay_num_steps=10) for total in (30, 300))
    assert short[:20] == long[:20] and short[20:] != long[20:]


def test_a_warm_up_that_reaches_into_the_decay_comes_first() -> None:
    found = rates(12, total_num_steps=10, warmup_num_steps=8, decay_num_steps=5, decay_type="linear")
    assert found == pytest.approx([PEAK * ratio for ratio in [0, *(k / 8 for k in range(8)), 0.2, 0, 0]])


def test_a_resumed_run_has_the_length_of_its_json() -> None:
    def engine(total: int) -> Any:
        made = optimizer()
        return SimpleNamespace(optimizer=made, lr_scheduler=WarmupStableDecayLR(made, total, warmup_num_steps=2, decay_num_steps=5))

    saved, resumed = engine(20), engine(40)
    settings = EngineSettings(resumed)
    for _ in range(18):
        saved.lr_scheduler.step()
    resumed.lr_scheduler.load_state_dict(saved.lr_scheduler.state_dict())
    resumed.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert resumed.optimizer.param_groups[0]["lr"] < PEAK, "the decay of the other length"
    settings.apply()
    assert resumed.optimizer.param_groups[0]["lr"] == PEAK


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"decay_type": "steep"}, "decay_type must be one of linear, sqrt, cosine, not 'steep'"),
        ({"decay_num_steps": 0}, r"decay_num_steps must be 1 to total_num_steps \(20\), not 0"),
        ({"decay_num_steps": 21}, r"decay_num_steps must be 1 to total_num_steps \(20\), not 21"),
        ({"decay_min_ratio": 1.5}, "decay_min_ratio must be 0 to 1, not 1.5"),
        ({"decay_min_ratio": math.nan}, "decay_min_ratio must be 0 to 1, not nan"),
    ],
)
def test_what_is_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        WarmupStableDecayLR(optimizer(), 20, **{"decay_num_steps": 5, **params})


def test_whose_a_schedule_is() -> None:
    assert schedules.find("WarmupStableDecayLR") is WarmupStableDecayLR and not schedules.is_torchs("WarmupStableDecayLR")
    assert schedules.find("WarmupCosineLR") and not schedules.is_torchs("WarmupCosineLR")
    assert schedules.find("StepLR") is torch.optim.lr_scheduler.StepLR and schedules.is_torchs("StepLR")
    assert schedules.find("WARMUP_LOG_RATE") is None, "a name of the module, and no class"
    assert schedules.made_here({"scheduler": {"type": "WarmupCosineLR"}}) is None is schedules.made_here({})


def test_one_run_of_two_lengths(forked_train: Callable[..., Any], small_shards: Path, small_model: Path, tmp_path: Path) -> None:
    """Through DeepSpeed's engine: begun for 10 steps, gone on with for 14 from before its decay."""
    config = json.loads(Path("ds_configs/cpu_ep1_zero2_fp32.json").read_text())
    config["scheduler"] = json.loads(Path("ds_configs/ep8_zero2_wsd.json").read_text())["scheduler"]
    config["scheduler"]["params"]["decay_num_steps"] = 4
    (tmp_path / "wsd.json").write_text(json.dumps(config))
    peak = config["optimizer"]["params"]["lr"]
    flags = ["--data", small_shards, "--model", small_model, "--sequence_length", 32, "--deepspeed_config", tmp_path / "wsd.json"]
    flags += ["--output", tmp_path / "run", "--log_interval", 1, "--eval_interval", 0, "--tracker", "none"]
    first = forked_train(1, *flags, "--max_steps", 10, "--save_interval", 5)
    assert first.returncode == 0, first.stderr
    after = [1 - (k / 4) ** 0.5 for k in range(1, 4)]  # the fourth would be a step beyond the last
    assert logged(tmp_path / "run") == pytest.approx([peak * ratio for ratio in [0, 0, 0.5, 1, 1, 1, 1, *after]])
    again = forked_train(1, *flags, "--max_steps", 14, "--resume", "step_5")
    assert again.returncode == 0, again.stderr
    assert logged(tmp_path / "run") == pytest.approx([peak * ratio for ratio in [0, 0, 0.5, *[1] * 8, *after]])


def logged(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["lr"] for row in rows if "lr" in row]
