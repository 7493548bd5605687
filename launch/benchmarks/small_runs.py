"""Many small trainings by the real command, each in its folder, and what is read out of them afterwards."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import UserError, say
from data.files import replace_file
from launch.benchmarks.leash import run_leashed
from launch.planning.ladder import active_parameters
from launch.ranks.join import free_port
from launch.reporting.read import Run, read_run
from model import MoEGPTConfig
from model.accounting import training_flops_per_token

ROOT = Path(__file__).resolve().parents[2]
#: Maps of the experts' load over a run, from which the whole run's balance is taken.
LOAD_MAPS = 40
SETTLED = 0.1  # of a run: what comes before counts neither for the balance nor for the gradient norms


def add_arguments(parser: argparse.ArgumentParser, *, folder: str) -> None:
    """The flags of whatever trains many small runs."""
    parser.add_argument("--data", nargs="+", required=True, metavar="DIR[:WEIGHT]", help="folders of data/preprocess.py")
    parser.add_argument("--deepspeed_config", type=Path, default=Path("ds_configs/cpu_ep1_zero2.json"), metavar="JSON")
    parser.add_argument("--sequence_length", type=int, default=256, metavar="N", help="tokens of one sample")
    parser.add_argument("--eval_batches", type=int, default=16, metavar="N", help="global batches of one evaluation")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of a run, by the deepspeed launcher")
    parser.add_argument("--folder", type=Path, default=Path(folder), metavar="DIR", help="where the runs go")


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Raises UserError for a flag of these that is below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")


@dataclass(frozen=True, kw_only=True)
class SmallRun:
    """One training: `python launch/train.py` or, on several ranks, the `deepspeed` launcher's."""

    folder: Path
    config: MoEGPTConfig
    deepspeed: dict[str, Any]
    data: tuple[str, ...]
    steps: int
    seed: int
    sequence_length: int
    evaluations: int
    eval_batches: int
    ranks: int = 1
    flags: tuple[str, ...] = ()

    @property
    def interval(self) -> int:
        return math.ceil(self.steps / self.evaluations)

    @property
    def flops_per_token(self) -> float:
        return training_flops_per_token(self.config, self.sequence_length)

    @property
    def active(self) -> int:
        """As `launch.planning.ladder.active_parameters`."""
        return active_parameters(self.config)

    def command(self, stop_after: int) -> list[str]:
        if self.ranks == 1:
            launcher = [sys.executable]
        else:
            launcher = ["deepspeed", "--quiet", "--num_gpus", str(self.ranks), "--master_port", str(free_port())]
        return [*launcher, str(ROOT / "launch" / "train.py"), *self.arguments(stop_after)]

    def arguments(self, stop_after: int) -> list[str]:
        """Of `launch/train.py`."""
        flags: dict[str, object] = {
            "output": self.folder / "run",
            "model": self.folder / "model.json",
            "deepspeed_config": self.folder / "deepspeed.json",
            "max_steps": self.steps,
            "stop_after": stop_after,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "log_interval": 1,
            "eval_interval": self.interval,
            "eval_batches": self.eval_batches,
            "save_interval": self.interval,
            "keep_last": 1,
            "health_interval": max(1, self.steps // LOAD_MAPS),
            "wandb": "disabled",
        }
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return ["--data", *self.data, *given, *self.flags]

    def is_done(self, step: int) -> bool:
        metrics = self.folder / "run" / "metrics.jsonl"
        return metrics.is_file() and read_run(metrics.parent).last_step >= step

    def train(self, stop_after: int) -> None:
        """Goes on to this step from wherever it is. Raises UserError where the training ends otherwise, with its last words."""
        if self.is_done(stop_after):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, values in (("model", self.config.to_dict()), ("deepspeed", self.deepspeed)):
            replace_file(self.folder / f"{name}.json", json.dumps(values, indent=2).encode())
        say(f"{self.folder.parent.name} {self.folder.name}: to step {stop_after} of {self.steps}")
        code = run_leashed(self.command(stop_after), self.folder / "log.txt")
        words = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = words[-1] if words else "without a word"
        if code:
            raise UserError(f"{self.folder}: the training ended with exit code {code}: {last}")
        if not self.is_done(stop_after):  # by a signal of somebody's, or --patience: no result for this many tokens
            raise UserError(f"{self.folder}: the training stopped before step {stop_after}: {last}; the same command goes on")

    def result(self) -> dict[str, Any]:
        """For JSON; see `measured`."""
        values = measured(read_run(self.folder / "run"), self.evaluations)
        return {"seed": self.seed, "active_parameters": self.active, "flops_per_token": self.flops_per_token, **values}


def measured(run: Run, evaluations: int) -> dict[str, Any]:
    """`tokens`, `loss` and `bits` at the start and after each of as many equal parts of the run (by the evaluation nearest to its
    end, so that runs of unequal lengths compare); gradient norms, balance, skipped steps and seconds of the whole run."""
    train = run.train
    per_step = train.get("tokens")[-1] / train.steps[-1]
    logged = [row for row in run.evaluations if isinstance(row.get("val_bits_per_byte"), (int, float))]
    ends = [part * train.steps[-1] / evaluations for part in range(evaluations + 1)]
    rows = [min(logged, key=lambda row: abs(row["step"] - end)) for end in ends]
    settled = train.steps > SETTLED * train.steps[-1]
    norms = train.get("grad_norm")[settled]
    worst = train.layers["max_vio"].max(axis=1)[settled] if "max_vio" in train.layers else np.full(1, math.nan)
    return {
        "tokens": [int(row["step"] * per_step) for row in rows],
        "loss": [row["val_loss"] for row in rows],
        "bits": [row["val_bits_per_byte"] for row in rows],
        "grad_norm": {"median": float(np.nanmedian(norms)), "largest": float(np.nanmax(norms))},
        "max_vio": {"step": float(np.nanmedian(worst)), "run": load_of_the_run(run, int(SETTLED * train.steps[-1]))},
        "skipped": sum(mark.kind == "skipped" for mark in run.marks),
        "seconds": float(np.nansum(train.get("step_seconds"))),
    }


def load_of_the_run(run: Run, after: int) -> float:
    """The worst layer's largest load over its mean, less 1, of all load maps after this step together."""
    maps = [np.array(row["expert_load"], np.float64) for row in run.snapshots if "expert_load" in row and row["step"] > after]
    if not maps:
        return math.nan
    load_YE = np.sum(maps, axis=0)
    return float((load_YE.max(axis=1) / load_YE.mean(axis=1) - 1).max())
