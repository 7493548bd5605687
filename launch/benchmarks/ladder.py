"""A family of small models trained by the real command, a scaling law through them, and what it says of the large ones.

python launch/benchmark.py ladder --data shards/ --hidden 64 128 192 256 --tokens 4e5 8e5 1.6e6 --output ladder.json
python launch/plan.py --model 800m --gpu h100-80gb --tokens 20e9 --ladder ladder.json

The family has 800m's shape: a layer for each head, a third as many keys and values, experts a third of the width. Heads are half as
wide as 800m's, so that the smallest member has two layers.
The law must predict the largest width without having seen it. A killed ladder goes on where it was, in --folder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from data.cli import UserError
from launch.benchmarks.svg import svg_path
from launch.benchmarks.svg_curves import Curve, draw
from launch.benchmarks.training_runs import small_runs
from launch.benchmarks.training_runs.checks import check_runs
from launch.benchmarks.training_runs.rungs import check, family_facts, held_out_width, plan_runs, with_seeds
from launch.benchmarks.training_runs.same_run import claimed
from launch.benchmarks.training_runs.scaling_law import Point, bootstrap, fit
from launch.benchmarks.training_runs.shards import Shards, epochs
from launch.benchmarks.training_runs.small_runs import SmallRun, train_in_turns
from launch.benchmarks.training_runs.trials import announce, judged, plan_trials
from launch.benchmarks.training_runs.trials import in_words as trials_in_words
from launch.planning.ladder import Ladder, Law, active_parameters, in_words
from launch.words import short
from model import MoEGPTConfig
from model.accounting import training_flops_per_token

LARGE = ("60m", "800m")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    small_runs.add_arguments(parser, folder="runs/ladder")
    parser.add_argument(
        "--hidden",
        type=int,
        nargs="+",
        default=[64, 96, 128, 160],
        metavar="N",
        help="widths of the models; multiples of --head_dim",
    )
    parser.add_argument(
        "--head_dim", type=int, default=32, metavar="N", help="width of a head; a model has as many layers as heads; 800m: 64"
    )
    parser.add_argument(
        "--held_out",
        default="largest",
        metavar="N",
        help="the width that the law must predict without having seen it; largest, or none to fit all and check nothing",
    )
    parser.add_argument(
        "--held_out_tokens",
        type=float,
        nargs="+",
        metavar="T",
        help="which of --tokens the held-out width is trained for (default: all)",
    )
    parser.add_argument(
        "--tokens",
        type=float,
        nargs="+",
        default=[4e5, 8e5, 1.6e6],
        metavar="T",
        help="token counts; each is a run with a schedule of its own",
    )
    parser.add_argument(
        "--rate_exponent",
        type=float,
        default=0.0,
        metavar="X",
        help="multiply the JSON's learning rate, which is the smallest width's, by (smallest / width)^X, for 60m and 800m too; "
        "muP's matrices: 1",
    )
    parser.add_argument(
        "--rate_hidden", type=int, metavar="N", help="the width that the JSON's learning rate is for (default: the smallest)"
    )
    parser.add_argument(
        "--learning_rates", type=float, nargs="*", default=[], metavar="LR", help="learning rates to try on the smallest width"
    )
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[], metavar="N", help="batch sizes in samples to try on the smallest width"
    )
    parser.add_argument(
        "--tune_hidden",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="also try the rates, scaled by --rate_exponent, on these widths of --hidden, to check the exponent",
    )
    parser.add_argument("--tune_tokens", type=float, metavar="T", help="tokens of such a trial (default: the largest of --tokens)")
    parser.add_argument(
        "--target_tokens", type=float, default=20e9, metavar="T", help="token count for which 60m and 800m are predicted"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1234],
        metavar="N",
        help="random seeds of weights and data order; the law is fitted to their means; trials use the first",
    )
    parser.add_argument("--chart", type=svg_path, metavar="SVG", help="also draw a chart of the measurements, with the law dashed")
    parser.add_argument("--draws", type=int, default=100, metavar="N", help="number of bootstrapped laws for the intervals")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    check(arguments)
    shards = Shards()
    train, _ = shards.of(arguments.data, arguments.sequence_length)
    rungs = plan_runs(arguments, train.vocab_size)
    trials, family = plan_trials(arguments, rungs), with_seeds(rungs, arguments.seeds)
    of_family = [one for runs in family.values() for one in runs]
    runs = (*of_family, *trials.values())
    check_runs(runs, shards)
    times_read = epochs(train, max(one.tokens for one in runs))
    with claimed(runs, shards):
        announce(of_family, trials, times_read)
        failed = train_in_turns(runs)
    if missing := [failed[one.name] for one in of_family if one.name in failed]:
        raise UserError("; ".join(missing))
    bits = {key: [bits_of(one) for one in runs] for key, runs in family.items()}
    points = {key: (float(one.active), float(one.tokens), fmean(bits[key])) for key, one in rungs.items()}
    result = climb(points, held_out=held_out_width(arguments), draws=arguments.draws)
    for point, of_seeds in zip(result["points"], bits.values(), strict=True):
        point["of_seeds"] = of_seeds
    result |= judged(trials, failed)
    result |= {"family": family_facts(arguments, rungs), "epochs": times_read}
    result["predictions"] = predict(result, arguments)
    show(result)
    for line in trials_in_words(result, result["family"]):
        print(line)
    if arguments.chart:
        draw_chart(arguments.chart, result)
    return {**result, "failed": failed}


def bits_of(one: SmallRun) -> float:
    """What the law is fitted to. Raises UserError for a run that diverged."""
    bits = float(one.result()["bits"][-1])
    if not math.isfinite(bits):
        raise UserError(f"{one.name} diverged, and no law goes through that: lower the learning rate, name another --folder")
    return bits


def climb(points: dict[tuple[int, float], Point], *, held_out: int | None, draws: int) -> dict[str, Any]:
    """Of what `Ladder.read` reads the law through all widths but the held-out one, its bootstrap, how far it is off on that one."""
    seen = [point for (hidden, _), point in points.items() if hidden != held_out]
    unseen = [point for (hidden, _), point in points.items() if hidden == held_out]
    try:
        law = fit(seen)
    except ValueError as error:
        measured = ", ".join(f"{hidden} at {tokens:.3g}: {bits:.3f}" for (hidden, tokens), (_, _, bits) in points.items())
        raise UserError(f"{error}; bits per byte by width and tokens: {measured}") from error
    return {
        "law": asdict(law),
        "bootstrap": [asdict(other) for other in bootstrap(seen, law, draws=draws)],
        "largest": {"active": max(p[0] for p in points.values()), "tokens": max(p[1] for p in points.values())},
        "fit_error": largest_error(law, seen),
        "held_out_error": largest_error(law, unseen) if unseen else None,
        "held_out_step": step_outward({n for n, _, _ in seen}, unseen[0][0]) if unseen else None,
        "points": [{"hidden": hidden, "active": n, "tokens": d, "bits": bits} for (hidden, _), (n, d, bits) in points.items()],
        "held_out": held_out,
    }


def largest_error(law: Law, points: Sequence[Point]) -> float:
    return max(abs(law.bits(active, tokens) / bits - 1) for active, tokens, bits in points)


def step_outward(fitted: set[float], unseen: float) -> float:
    """How many times the nearest fitted size, upward or downward; 1 between them."""
    return max(unseen / max(fitted), min(fitted) / unseen, 1.0)


def as_ladder(result: dict[str, Any]) -> Ladder:
    given = {field.name: result[field.name] for field in fields(Ladder)}
    return Ladder(**{**given, "law": Law(**result["law"]), "bootstrap": [Law(**law) for law in result["bootstrap"]]})


def predict(result: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    ladder, tokens = as_ladder(result), arguments.target_tokens
    found = {}
    for name in LARGE:
        config = MoEGPTConfig.preset(name)
        flops = tokens * training_flops_per_token(config, 2048)
        expected = ladder.expectation(active_parameters(config), tokens, flops, config.hidden_size, config.vocab_size)
        found[name] = {"target_tokens": tokens, **expected}
    return found


def show(result: dict[str, Any]) -> None:
    from launch.benchmarks.measure import print_table

    law = Law(**result["law"])
    several = len(result["points"][0]["of_seeds"]) > 1
    rows = []
    for p in result["points"]:
        of_seeds = band(p)[::2] if several else ()
        rows.append([p["hidden"], short(p["active"]), short(p["tokens"]), p["bits"], *of_seeds, law.bits(p["active"], p["tokens"])])
    columns = ["width", "active", "tokens", "measured", *(["least", "greatest"] if several else ()), "law"]
    print_table("validation bits per byte", columns, rows)
    if trials := result["trials"]:
        rows = [
            [one["hidden"], one["learning_rate"], short(one["batch_tokens"]), short(one["tokens"]), one["bits"]] for one in trials
        ]
        print_table("tried", ["width", "learning rate", "tokens a step", "tokens", "measured"], rows)
    print("bits = {E:.3f} + {A:.4g} / N^{alpha:.3f} + {B:.4g} / D^{beta:.3f}".format(**result["law"]))
    print(f"off by {result['fit_error']:.1%} at most on what was fitted")
    if result["held_out_error"] is not None:
        print(f"width {result['held_out']} was not fitted: off by {result['held_out_error']:.1%} at most")
    for name, found in result["predictions"].items():
        print("\n".join([f"{name}:", *(f"  {line}" for line in in_words(found, tokens=found["target_tokens"]))]))


def draw_chart(path: Path, result: dict[str, Any]) -> None:
    """A curve for each width over tokens, and one for each token count over active parameters; the law through the same range."""
    law, points = Law(**result["law"]), result["points"]
    panels: dict[str, list[Curve]] = {"tokens": [], "active parameters": []}
    for hidden in dict.fromkeys(p["hidden"] for p in points):
        name = f"width {hidden}" + (", not fitted" if hidden == result["held_out"] else "")
        panels["tokens"] += two_curves(name, "tokens", [p for p in points if p["hidden"] == hidden], law)
    for tokens in dict.fromkeys(p["tokens"] for p in points):
        name = f"{short(tokens)} tokens"
        panels["active parameters"] += two_curves(name, "active", [p for p in points if p["tokens"] == tokens], law)
    draw(path, panels, "Validation bits per byte, measured and by the law (dashed)", unit="bits per byte")


def two_curves(name: str, across: str, points: list[dict[str, Any]], law: Law) -> list[Curve]:
    """Of points that differ in `across` alone: what was measured, and the law between the least and the greatest."""
    x = [p[across] for p in points]
    between = [{**points[0], across: value} for value in np.geomspace(min(x), max(x), 32)]
    expected = [law.bits(p["active"], p["tokens"]) for p in between]
    return [
        Curve(name=name, points=[(p[across], *band(p)) for p in points]),
        Curve(name=name, points=[(p[across], *3 * (y,)) for p, y in zip(between, expected, strict=True)], computed=True),
    ]


def band(point: dict[str, Any]) -> tuple[float, float, float]:
    """Least of the seeds, their mean, greatest."""
    return min(point["of_seeds"]), point["bits"], max(point["of_seeds"])
