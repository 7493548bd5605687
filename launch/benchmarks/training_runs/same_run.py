"""Whether what lies in a small run's folder is what is asked for, and that nobody else is at it. Before anything trains.

What a training is of it has written itself: `run/config.json` and, as it was given, `deepspeed.json`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from data.cli import UserError, sentence
from data.files import read_json
from data.lock import take_folder
from launch.benchmarks.training_runs.shards import Shards
from launch.benchmarks.training_runs.small_runs import SmallRun
from launch.checkpoint.identity import RunIdentity, differences, listed
from launch.run.arguments import TrainArguments, build_parser
from launch.run.resolve import fit_model
from model import MoEGPTConfig

#: Arguments of `launch/train.py` that change no figure. Of data and model the content is compared, not where it lies.
WHERE = frozenset(("data", "output", "model", "deepspeed_config"))
WATCHED = frozenset(("tracker", "tracker_detail", "wandb", "wandb_project", "profile", "health_interval", "verify"))
KEPT = frozenset(("save_interval", "keep_last", "keep_every", "async_save", "resume"))
STOPPED = frozenset(("stop_after", "max_hours", "stall_timeout"))


@contextlib.contextmanager
def claimed(runs: Iterable[SmallRun], shards: Shards) -> Iterator[None]:
    """Hold the folders of the runs that are not done against another command.

    Raises UserError for one that another command holds, and for one that holds the training of other settings.
    """
    by_folder = {run.folder: run for run in runs}
    for run in by_folder.values():
        check_same(run, shards)
    with contextlib.ExitStack() as held:
        for run in by_folder.values():
            if not run.is_done(run.steps):
                held.callback(take_folder(run.folder, "benchmark", flag="--folder").release)
        yield


def check_same(run: SmallRun, shards: Shards) -> None:
    """Raises UserError that names the folder and each setting in which what was trained there differs from what is asked."""
    output = run.folder / "run"
    if not (output / "config.json").exists() and not (output / "metrics.jsonl").exists():
        return  # nothing was trained
    remedy = "name another --folder, or remove that one"
    try:
        found = _differences(run, shards, read_json(output / "config.json"), read_json(run.folder / "deepspeed.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run.folder}: what was trained there cannot be read ({sentence(error)}); {remedy}") from error
    if found:
        raise UserError(f"{run.folder} holds a training of other settings (there -> asked): {listed(found)}; {remedy}")


def _differences(run: SmallRun, shards: Shards, config: dict[str, Any], deepspeed: dict[str, Any]) -> list[str]:
    asked = run.parsed()
    compared = {name: value for name, value in asked.as_json().items() if name not in WHERE | WATCHED | KEPT | STOPPED}
    usual = build_parser().get_default  # of an argument that there was not yet
    before = {name: config["arguments"].get(name, usual(name)) for name in compared}
    if evaluated(run, before["eval_interval"]):
        before["eval_interval"] = compared["eval_interval"]
    trained = RunIdentity(model=config["model"], data=config["data"])
    judged = shards.read_by(asked).validation.fingerprint
    judged_before = (config.get("validation") or {}).get("fingerprint", judged)  # runs of before 0.2 do not say
    return [
        *differences(before, json.loads(json.dumps(compared))),
        *differences({"ranks": config["world_size"]}, {"ranks": run.ranks}),
        *trained.conflicts(_identity(run, asked, shards)),
        *differences({"validation split": judged_before}, {"validation split": judged}),
        *differences({"deepspeed": deepspeed}, {"deepspeed": run.deepspeed}),
    ]


def evaluated(run: SmallRun, interval: int) -> bool:
    """Evaluations at this interval include those that `run` compares, but for the rounding of its own interval."""
    steps = {*range(0, run.steps, interval), run.steps} if interval else {run.steps}
    return all(
        min(abs(step - part * run.steps / run.evaluations) for step in steps) < part for part in range(1, run.evaluations + 1)
    )


def _identity(run: SmallRun, arguments: TrainArguments, shards: Shards) -> RunIdentity:
    """Model and data as `launch/train.py` would write them."""
    data = shards.read_by(arguments).train
    config = fit_model(MoEGPTConfig(**run.config.to_dict()), arguments, data)
    return RunIdentity(model=config.to_dict(), data={"content": data.fingerprint, "tokenizer": data.tokenizer_fingerprint})
