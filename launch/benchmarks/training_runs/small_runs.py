"""Many small trainings by the real command, each in its folder, and what is read out of them afterwards."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import UserError
from data.files import replace_json
from data.flags import at_least_one
from data.terminal import say
from launch.benchmarks.training_runs.leash import run_leashed
from launch.cli import CLONE
from launch.engine.strategy import CONFIG_FOLDER, resolve_config
from launch.planning.ladder import active_parameters
from launch.ranks.spawn import free_port
from launch.reporting.read import Run, read_run
from launch.run.arguments import TrainArguments, parse_arguments
from model import MoEGPTConfig
from model.accounting import training_flops_per_token

#: Maps of the experts' load over a run, from which the whole run's balance is taken.
LOAD_MAPS = 40
SETTLED = 0.1  # of a run: what comes before counts neither for the balance nor for the gradient norms
#: Bytes free below which a silent end is put down to a full disk.
NO_ROOM = 1 << 20


class TrainingFailed(UserError):
    """A training that ended before its last step."""


def add_arguments(parser: argparse.ArgumentParser, *, folder: str) -> None:
    """The flags of whatever trains many small runs."""
    parser.add_argument("--data", nargs="+", required=True, metavar="DIR[:WEIGHT]", help="folders that data/preprocess.py wrote")
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        default=CONFIG_FOLDER / "cpu_ep1_zero2.json",
        metavar="JSON",
        help="DeepSpeed JSON of every run (default: ds_configs/cpu_ep1_zero2.json)",
    )
    parser.add_argument("--sequence_length", type=int, default=256, metavar="N", help="tokens in a sample")
    parser.add_argument("--eval_batches", type=int, default=16, metavar="N", help="global batches in an evaluation")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks of a run, started by the deepspeed launcher")
    parser.add_argument(
        "--folder", type=Path, default=Path(folder), metavar="DIR", help="folder for the runs; the same command resumes them"
    )


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Raises UserError for a flag that is below 1: of `add_arguments`, or one of `names`."""
    at_least_one(arguments, "sequence_length", "eval_batches", "ranks", *names)


def check_seeds(seeds: Sequence[int]) -> None:
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: give each seed once")


@dataclass(frozen=True, kw_only=True)
class SmallRun:
    """One training: `python launch/train.py` or, on several ranks, the `deepspeed` launcher's."""

    folder: Path
    config: MoEGPTConfig
    model: str  # as the user calls what `config` was made of
    deepspeed: dict[str, Any]
    deepspeed_config: Path  # what `deepspeed` was made of
    data: tuple[str, ...]
    steps: int
    seed: int
    sequence_length: int
    evaluations: int
    eval_batches: int
    ranks: int = 1
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`wide seed_7`."""
        return f"{self.folder.parent.name} {self.folder.name}"

    @property
    def log(self) -> Path:
        """All that its training says."""
        return self.folder / "log.txt"

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

    @property
    def batch(self) -> int:
        """Samples of an optimizer step. Raises UserError for a batch that cannot be shared out over the ranks."""
        experts = self.config.n_routed_experts
        resolved = resolve_config(
            self.deepspeed, self.deepspeed_config, world_size=self.ranks, num_experts=experts, max_steps=self.steps
        )
        return int(resolved["train_batch_size"])

    @property
    def tokens(self) -> int:
        """That it trains on."""
        return self.steps * self.batch * self.sequence_length

    @property
    def flops(self) -> float:
        return self.tokens * self.flops_per_token

    def parsed(self) -> TrainArguments:
        """What its training reads on its command line. Raises UserError for a wrong one of `flags`."""
        return parse_arguments(self.arguments(self.steps))

    def command(self, stop_after: int) -> list[str]:
        if self.ranks == 1:
            launcher = [sys.executable]
        else:
            launcher = ["deepspeed", "--quiet", "--num_gpus", str(self.ranks), "--master_port", str(free_port())]
        return [*launcher, str(CLONE / "launch" / "train.py"), *self.arguments(stop_after)]

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
        """Trained to this step and, where that is the last, evaluated there."""
        metrics = self.folder / "run" / "metrics.jsonl"
        if not metrics.is_file():
            return False
        run = read_run(metrics.parent)
        return run.last_step >= step and (step < self.steps or any(row["step"] == step for row in run.evaluations))

    def train(self, stop_after: int) -> None:
        """Goes on to this step from wherever it is. Raises TrainingFailed, with its last words, where it does not get there."""
        if self.is_done(stop_after):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, values in (("model", self.config.to_dict()), ("deepspeed", self.deepspeed)):
            replace_json(self.folder / f"{name}.json", values)
        said = self.log.stat().st_size if self.log.exists() else 0
        say(f"{self.name}: to step {stop_after} of {self.steps}; it writes {self.log}")
        code = run_leashed(self.command(stop_after), self.log)
        if code:
            raise TrainingFailed(f"{self.name}: the training ended with exit code {code}: {self.last_words(said)} ({self.log})")
        if not self.is_done(stop_after):  # by a signal of somebody's, or --patience: no result for this many tokens
            raise TrainingFailed(
                f"{self.name}: the training stopped before step {stop_after}: {self.last_words(said)}; the same command goes on"
            )

    def last_words(self, said: int) -> str:
        """Its error, or whatever the log ends with, of what stands there after so many bytes."""
        lines = self.log.read_bytes()[said:].decode("utf-8", "replace").strip().splitlines()
        if not lines:
            return "no room is left on the disk" if shutil.disk_usage(self.folder).free < NO_ROOM else "it said nothing"
        errors = [line for line in lines if line.startswith("error")]  # after which a launcher has words of its own
        return (errors or lines)[-1]

    def result(self) -> dict[str, Any]:
        """For JSON; see `measured`."""
        values = measured(read_run(self.folder / "run"), self.evaluations)
        return {"seed": self.seed, "active_parameters": self.active, "flops_per_token": self.flops_per_token, **values}


def train_in_turns(runs: Sequence[SmallRun], slices: int = 1) -> dict[str, str]:
    """All of them, one after the other, a slice of each at a time. Why, by name, of those that failed; the others go on."""
    failed: dict[str, str] = {}
    for part in range(1, slices + 1):
        for run in runs:
            if run.name in failed:
                continue
            try:
                run.train(run.steps * part // slices)
            except TrainingFailed as error:
                say(f"failed: {error}")
                failed[run.name] = str(error)
    return failed


def measured(run: Run, evaluations: int) -> dict[str, Any]:
    """`tokens`, `loss` and `bits` at the start and after each of as many equal parts of the run (by the evaluation nearest to its
    end, so that runs of unequal lengths compare; NaN where the loss was not finite); gradient norms, balance, skipped steps and
    seconds of the whole run."""
    train = run.train
    per_step = train.get("tokens")[-1] / train.steps[-1]
    ends = [part * train.steps[-1] / evaluations for part in range(evaluations + 1)]
    rows = [min(run.evaluations, key=lambda row: abs(row["step"] - end)) for end in ends]
    settled = train.steps > SETTLED * train.steps[-1]
    norms = train.get("grad_norm")[settled]
    worst = train.layers["max_vio"].max(axis=1)[settled] if "max_vio" in train.layers else np.full(1, math.nan)
    return {
        "tokens": [int(row["step"] * per_step) for row in rows],
        "loss": [number(row["val_loss"]) for row in rows],
        "bits": [number(row["val_bits_per_byte"]) for row in rows],
        "grad_norm": {"median": float(np.nanmedian(norms)), "largest": float(np.nanmax(norms))},
        "max_vio": {"step": float(np.nanmedian(worst)), "run": load_of_the_run(run, int(SETTLED * train.steps[-1]))},
        "skipped": sum(mark.kind == "skipped" for mark in run.marks),
        "seconds": float(np.nansum(train.get("step_seconds"))),
    }


def number(logged: float | None) -> float:
    """A run's rows have null for what is not finite."""
    return math.nan if logged is None else float(logged)


def load_of_the_run(run: Run, after: int) -> float:
    """The worst layer's largest load over its mean, less 1, of all load maps after this step together."""
    maps = [np.array(row["expert_load"], np.float64) for row in run.snapshots if "expert_load" in row and row["step"] > after]
    if not maps:
        return math.nan
    load_YE = np.sum(maps, axis=0)
    return float((load_YE.max(axis=1) / load_YE.mean(axis=1) - 1).max())
