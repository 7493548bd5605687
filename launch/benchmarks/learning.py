"""What learns more: variants trained by the real command on the same samples for equal active FLOPs, over several seeds.

python launch/benchmark.py learning --data shards/ --variants ours sign none dense --seeds 1234 7 --max_steps 400
python launch/benchmark.py learning --data shards/ --variants ours --variants_file mine.json --output learning.json

The variants take turns, seed by seed (and within a run with --slices). A killed comparison goes on where it was, in --folder.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import UserError, counted
from data.terminal import say
from launch.benchmarks.svg import svg_path
from launch.benchmarks.svg_curves import Curve, draw
from launch.benchmarks.training_runs import small_runs
from launch.benchmarks.training_runs.checks import check_runs
from launch.benchmarks.training_runs.same_run import claimed
from launch.benchmarks.training_runs.shards import Shards, epochs
from launch.benchmarks.training_runs.small_runs import SmallRun, train_in_turns
from launch.benchmarks.training_runs.variants import Variant, built_in, chosen_variants
from launch.engine.strategy import read_config
from launch.model_config import load_model_config
from launch.words import short
from model import MoEGPTConfig

Runs = dict[str, list[SmallRun]]  # by variant, one for each seed
#: A variant trains whole steps, and one that is further than this off the FLOPs of the model as it is compares unfairly.
FAR_OFF = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    small_runs.add_arguments(parser, folder="runs/learning")
    parser.add_argument("--model", default="tiny", help="the model that is varied: a preset or a config.json")
    parser.add_argument(
        "--variants",
        nargs="*",
        default=["ours", "none", "dense"],
        metavar="NAME",
        help=f"built-in variants: {', '.join(built_in(MoEGPTConfig()))} (default: ours none dense)",
    )
    parser.add_argument(
        "--variants_file", type=Path, metavar="JSON", help='your own variants: [{"name", "model", "deepspeed", "flags"}]'
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1234, 7], metavar="N", help="random seeds of weights and data order"
    )
    parser.add_argument(
        "--max_steps", type=int, default=400, metavar="N", help="steps of the unchanged model; variants train for equal FLOPs"
    )
    parser.add_argument(
        "--evaluations", type=int, default=4, metavar="N", help="number of token counts at which variants are compared"
    )
    parser.add_argument(
        "--slices", type=int, default=1, metavar="N", help="train each run in this many parts, in turns with the others"
    )
    parser.add_argument(
        "--chart", type=svg_path, metavar="SVG", help="also draw a chart of bits per byte over tokens and over FLOPs"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of `failed`, by the run's name, why those ended that did not get to their end: their variants are in no table."""
    check(arguments)
    shards, runs = Shards(), plan_runs(arguments)
    shards.of(arguments.data, arguments.sequence_length)  # what is wrong with them is no variant's
    in_turns = [one for seeds in zip(*runs.values(), strict=True) for one in seeds]
    check_slices(in_turns, arguments.slices)
    check_runs(in_turns, shards)
    with claimed(in_turns, shards):
        announce(in_turns, shards)
        failed = train_in_turns(in_turns, arguments.slices)
    whole = {name: seeds for name, seeds in runs.items() if not failed.keys() & {one.name for one in seeds}}
    if not whole:
        raise UserError("; ".join(failed.values()))
    result = summarize({name: [one.result() for one in seeds] for name, seeds in whole.items()})
    names = ("model", "deepspeed_config", "data", "max_steps", "sequence_length", "eval_batches", "seeds", "ranks")
    result |= {"settings": {name: plain(getattr(arguments, name)) for name in names}, "failed": failed}
    show(result)
    if arguments.chart:
        draw_chart(arguments.chart, result)
    return result


def plain(value: Any) -> Any:
    """For JSON."""
    return str(value) if isinstance(value, Path) else value


def check(arguments: argparse.Namespace) -> None:
    """The flags by themselves. Raises UserError."""
    small_runs.check_counts(arguments, "max_steps", "evaluations", "slices")
    small_runs.check_seeds(arguments.seeds)


def plan_runs(arguments: argparse.Namespace) -> Runs:
    """Says which are off the FLOPs of the others. Raises UserError for a wrong variant, model or DeepSpeed JSON."""
    base, settings = load_model_config(arguments.model), read_config(arguments.deepspeed_config)

    def make(variant: Variant, seed: int) -> SmallRun:
        return SmallRun(
            folder=arguments.folder / variant.name / f"seed_{seed}",
            config=variant.config(base),
            model=arguments.model,
            deepspeed=variant.settings(settings, arguments.deepspeed_config),
            deepspeed_config=arguments.deepspeed_config,
            data=tuple(arguments.data),
            steps=arguments.max_steps,
            seed=seed,
            sequence_length=arguments.sequence_length,
            evaluations=arguments.evaluations,
            eval_batches=arguments.eval_batches,
            ranks=arguments.ranks,
            flags=variant.flags,
        )

    def shortened(one: SmallRun) -> SmallRun:
        """To the FLOPs of the model as it is."""
        return replace(one, steps=max(1, round(one.steps * budget / one.flops)))

    budget = make(Variant(name="as it is"), seed=0).flops
    variants = chosen_variants(arguments.variants, arguments.variants_file, base)
    runs = {variant.name: [shortened(make(variant, seed)) for seed in arguments.seeds] for variant in variants}
    for name, (one, *_) in runs.items():
        if abs(off := one.flops / budget - 1) > FAR_OFF:
            say(f"warning: {name} trains {counted(one.steps, 'step')}, which is {off:+.1%} off equal FLOPs; raise --max_steps")
    return runs


def check_slices(runs: list[SmallRun], slices: int) -> None:
    """Raises UserError for more than the shortest run has steps."""
    shortest = min(runs, key=lambda one: one.steps)
    if slices > shortest.steps:
        raise UserError(f"--slices {slices} of {shortest.name}, which has {counted(shortest.steps, 'step')}: give fewer")


def announce(runs: list[SmallRun], shards: Shards) -> None:
    """What it will cost, and whether the data are enough for it."""
    done = sum(one.is_done(one.steps) for one in runs)
    each = " to ".join(dict.fromkeys(f"{extreme(one.flops for one in runs):.2g}" for extreme in (min, max)))
    cost = f"{counted(len(runs), 'run')} of {each} FLOPs each"
    say(cost + (f"; already done: {done}" if done else ""))
    times_read = {one.name: epochs(shards.read_by(one.parsed()).train, one.tokens) for one in runs}
    most = max(times_read, key=lambda name: times_read[name])
    if times_read[most] > 1:
        say(f"warning: {most} reads the data {times_read[most]:.3g} times; lower --max_steps or give more --data")


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """`{"runs": as given, "variants": {name: row}}`: means over the seeds, and how far these lie apart.

    Shapes: S seeds, C token counts.
    """
    rows = {}
    for name, seeds in runs.items():
        bits_SC = np.array([one["bits"] for one in seeds])
        rows[name] = {
            "tokens": seeds[0]["tokens"],
            "flops_per_token": seeds[0]["flops_per_token"],
            "bits": bits_SC.mean(axis=0).tolist(),
            "least": bits_SC.min(axis=0).tolist(),
            "greatest": bits_SC.max(axis=0).tolist(),
            "spread": bits_SC.std(axis=0, ddof=1).tolist() if len(seeds) > 1 else [None] * bits_SC.shape[1],
            "grad_norm_median": statistics.fmean(one["grad_norm"]["median"] for one in seeds),
            "grad_norm_largest": float(np.max([one["grad_norm"]["largest"] for one in seeds])),
            "max_vio_step": statistics.fmean(one["max_vio"]["step"] for one in seeds),
            "max_vio_run": statistics.fmean(one["max_vio"]["run"] for one in seeds),
            "skipped": sum(one["skipped"] for one in seeds),
            "seconds": statistics.fmean(one["seconds"] for one in seeds),
        }
    return {"variants": rows, "runs": runs}


def show(result: dict[str, Any]) -> None:
    """What each column is stands in launch/benchmarks/README.md."""
    from launch.benchmarks.measure import print_table

    rows = result["variants"]
    parts = len(next(iter(rows.values()))["bits"]) - 1
    columns = ["variant", "tokens", *(f"at {part}/{parts}" for part in range(1, parts + 1))]
    columns += ["norm", "largest", "max_vio", "of run", "skipped", "seconds"]
    table: list[list[object]] = []
    for name, row in rows.items():
        pairs = zip(row["bits"][1:], row["spread"][1:], strict=True)
        bits = [f"{mean:.4f}" + (f" ±{spread:.4f}" if spread is not None else "") for mean, spread in pairs]
        norms = (f"{row['grad_norm_median']:.2f}", f"{row['grad_norm_largest']:.2f}")
        balance = (f"{row['max_vio_step']:.2f}", f"{row['max_vio_run']:.2f}")
        table.append([name, short(row["tokens"][-1]), *bits, *norms, *balance, row["skipped"], f"{row['seconds']:.3g}"])
    seeds = counted(len(next(iter(result["runs"].values()))), "seed")
    print_table(f"validation bits per byte by part of the run: mean of {seeds} ± standard deviation", columns, table)


def draw_chart(path: Path, result: dict[str, Any]) -> None:
    """From the first evaluation after training began; a mean that is not finite is left out."""
    panels: dict[str, list[Curve]] = {"tokens": [], "training FLOPs": []}
    for name, row in result["variants"].items():
        for label, factor in (("tokens", 1.0), ("training FLOPs", row["flops_per_token"])):
            columns = zip(row["tokens"], row["least"], row["bits"], row["greatest"], strict=True)
            points = [(t * factor, a, b, c) for t, a, b, c in columns if t > 0 and math.isfinite(b)]
            panels[label].append(Curve(name=name, points=points))
    draw(path, panels, "Validation bits per byte, mean and range of the seeds", unit="bits per byte")
