"""What a training would refuse, said before the first of many starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data.cli import UserError
from launch.benchmarks.training_runs.shards import Shards
from launch.benchmarks.training_runs.small_runs import SmallRun
from launch.run.resolve import fit_model, open_tasks, resolve_settings
from model import MoEGPTConfig

#: Arguments of `launch/train.py` on which it rests that runs compare: a variant's flags may not set them.
OURS = (
    *("output", "model", "deepspeed_config", "max_steps", "stop_after", "seed", "sequence_length"),
    *("log_interval", "eval_interval", "eval_batches"),
)


def check_runs(runs: Sequence[SmallRun], shards: Shards) -> None:
    """Raises UserError for the first run that would not train, by its name, and for two that are not judged on the same text."""
    for run in runs:
        try:
            check_run(run, shards)
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from error
    first = runs[0]
    for run in runs[1:]:
        if shards.read_by(run.parsed()).validation.fingerprint != shards.read_by(first.parsed()).validation.fingerprint:
            raise UserError(
                f"{run.name} has another validation split than {first.name}: bits per byte of other text do not compare; give "
                "its folder of shards the validation split of the other's"
            )


def check_run(run: SmallRun, shards: Shards) -> None:
    """Flags, data, model and DeepSpeed JSON, as far as one rank can see them. Raises UserError."""
    arguments = run.parsed()
    own, given = replace(run, flags=()).parsed().as_json(), arguments.as_json()
    for name in OURS:
        if own[name] != given[name]:
            raise UserError(f"flags: --{name} is the benchmark's own; take it out of the variant")
    if run.evaluations > run.steps:
        raise UserError(f"--evaluations {run.evaluations} are more than its {run.steps} steps; give fewer, or more --max_steps")
    train, _ = shards.read_by(arguments)
    named = replace(arguments, model=run.model)  # for the sentences: the run's own file is not there yet
    config = fit_model(MoEGPTConfig(**run.config.to_dict()), named, train)
    open_tasks(arguments, train)
    resolve_settings(run.deepspeed, run.deepspeed_config, arguments, world_size=run.ranks, num_experts=config.n_routed_experts)
