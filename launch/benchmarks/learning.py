"""What learns more: variants trained by the real command on the same samples for equal active FLOPs, over several seeds.

python launch/benchmark.py learning --data shards/ --variants ours sign none dense --seeds 1234 7 --max_steps 400
python launch/benchmark.py learning --data shards/ --variants ours --variants_file mine.json --output learning.json

The variants take turns, seed by seed (and within a run with --slices). A killed comparison goes on where it was, in --folder.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from data.cli import UserError
from launch.benchmarks import small_runs
from launch.benchmarks.lines import Curve, draw
from launch.benchmarks.same_run import claimed
from launch.benchmarks.small_runs import SmallRun
from launch.benchmarks.variants import Variant, chosen_variants
from launch.engine.build import load_model_config
from launch.engine.strategy import read_config
from model.accounting import training_flops_per_token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    small_runs.add_arguments(parser, folder="runs/learning")
    parser.add_argument("--model", default="tiny", help="what the variants vary: a preset or a config.json")
    parser.add_argument("--variants", nargs="*", default=["ours", "none", "dense"], metavar="NAME", help="built-in ones")
    parser.add_argument("--variants_file", type=Path, metavar="JSON", help='more: [{"name", "model", "deepspeed", "flags"}]')
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 7], metavar="N", help="of weights and data order")
    parser.add_argument("--max_steps", type=int, default=400, metavar="N", help="of the model as it is; others by their FLOPs")
    parser.add_argument("--evaluations", type=int, default=4, metavar="N", help="token counts at which variants are compared")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="parts of a run after which another has its turn")
    parser.add_argument("--chart", type=Path, metavar="SVG", help="also draw bits per byte over tokens and over FLOPs there")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    small_runs.check_counts(arguments, "max_steps", "evaluations", "slices", "ranks")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise UserError(f"--seeds {' '.join(map(str, arguments.seeds))}: give each seed once")
    runs = plan_runs(arguments)
    in_turns = [one for seeds in zip(*runs.values(), strict=True) for one in seeds]
    with claimed(in_turns):
        for part in range(1, arguments.slices + 1):
            for one in in_turns:
                one.train(one.steps * part // arguments.slices)
    result = summarize({name: [one.result() for one in seeds] for name, seeds in runs.items()})
    settings = {name: getattr(arguments, name) for name in ("model", "max_steps", "sequence_length", "seeds", "ranks")}
    result["settings"] = settings
    show(result)
    if arguments.chart:
        draw_chart(arguments.chart, result)
    return result


def plan_runs(arguments: argparse.Namespace) -> dict[str, list[SmallRun]]:
    """By variant, a run for each seed. Everything is checked before the first one starts."""
    base, settings = load_model_config(arguments.model), read_config(arguments.deepspeed_config)
    variants = chosen_variants(arguments.variants, arguments.variants_file, base)
    length = arguments.sequence_length
    flops = training_flops_per_token(base, length)

    def make(variant: Variant, seed: int) -> SmallRun:
        config = variant.config(base)
        return SmallRun(
            folder=arguments.folder / variant.name / f"seed_{seed}",
            config=config,
            deepspeed=variant.settings(settings),
            data=tuple(arguments.data),
            steps=max(1, round(arguments.max_steps * flops / training_flops_per_token(config, length))),
            seed=seed,
            sequence_length=length,
            evaluations=arguments.evaluations,
            eval_batches=arguments.eval_batches,
            ranks=arguments.ranks,
            flags=variant.flags,
        )

    return {variant.name: [make(variant, seed) for seed in arguments.seeds] for variant in variants}


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """`{"runs": as given, "variants": {name: row}}`: means over the seeds, and how far these lie apart."""
    rows = {}
    for name, seeds in runs.items():
        by_count = list(zip(*(one["bits"] for one in seeds), strict=True))
        rows[name] = {
            "tokens": seeds[0]["tokens"],
            "flops_per_token": seeds[0]["flops_per_token"],
            "bits": [statistics.fmean(bits) for bits in by_count],
            "least": [min(bits) for bits in by_count],
            "greatest": [max(bits) for bits in by_count],
            "spread": [statistics.stdev(bits) if len(bits) > 1 else None for bits in by_count],
            "grad_norm_median": statistics.fmean(one["grad_norm"]["median"] for one in seeds),
            "grad_norm_largest": max(one["grad_norm"]["largest"] for one in seeds),
            "max_vio_step": statistics.fmean(one["max_vio"]["step"] for one in seeds),
            "max_vio_run": statistics.fmean(one["max_vio"]["run"] for one in seeds),
            "skipped": sum(one["skipped"] for one in seeds),
            "seconds": statistics.fmean(one["seconds"] for one in seeds),
        }
    return {"variants": rows, "runs": runs}


def show(result: dict[str, Any]) -> None:
    from launch.benchmarks.measure import print_table

    rows = result["variants"]
    counts = next(iter(rows.values()))["tokens"][1:]
    seeds = len(next(iter(result["runs"].values())))
    columns = ["variant", *(f"{count / 1e6:.3g}M" for count in counts), "norm", "largest", "max_vio", "of run", "skipped", "s"]
    table: list[list[object]] = []
    for name, row in rows.items():
        pairs = zip(row["bits"][1:], row["spread"][1:], strict=True)
        bits = [f"{mean:.4f}" + (f" ±{spread:.4f}" if spread is not None else "") for mean, spread in pairs]
        norms = (f"{row['grad_norm_median']:.2f}", f"{row['grad_norm_largest']:.2f}")
        balance = (f"{row['max_vio_step']:.2f}", f"{row['max_vio_run']:.2f}")
        table.append([name, *bits, *norms, *balance, row["skipped"], f"{row['seconds']:.0f}"])
    print_table(f"validation bits per byte by tokens: mean of {seeds} seeds ± standard deviation", columns, table)


def draw_chart(path: Path, result: dict[str, Any]) -> None:
    """From the first evaluation after training began."""
    panels: dict[str, list[Curve]] = {"tokens": [], "training FLOPs": []}
    for name, row in result["variants"].items():
        for label, factor in (("tokens", 1.0), ("training FLOPs", row["flops_per_token"])):
            columns = zip(row["tokens"], row["least"], row["bits"], row["greatest"], strict=True)
            panels[label].append(Curve(name=name, points=[(t * factor, a, b, c) for t, a, b, c in columns if t > 0]))
    draw(path, panels, "Validation bits per byte, mean and range of the seeds", unit="bits per byte")
