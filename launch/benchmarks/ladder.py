"""A family of small models trained by the real command, a scaling law through them, and what it says of the large ones.

python launch/benchmark.py ladder --data shards/ --hidden 64 128 192 256 --held_out 256 --tokens 4e5 8e5 1.6e6 --output ladder.json
python launch/plan.py --model 800m --gpu h100-80gb --tokens 20e9 --ladder ladder.json

The family has 800m's shape: a layer for each head, a third as many keys and values, experts a third of the width. Heads are half as
wide as 800m's, so that the smallest member has two layers.
A killed ladder goes on where it was, in --folder.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from data.cli import UserError
from data.dataset import PackedDataset
from launch.benchmarks import small_runs
from launch.benchmarks.same_run import claimed
from launch.benchmarks.scaling_law import Point, bootstrap, fit
from launch.benchmarks.small_runs import SmallRun
from launch.benchmarks.variants import merged
from launch.engine.strategy import lookup, read_config
from launch.planning.ladder import Ladder, Law, active_parameters, in_words
from model import MoEGPTConfig
from model.accounting import training_flops_per_token

LARGE = ("60m", "800m")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    small_runs.add_arguments(parser, folder="runs/ladder")
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[64, 96, 128, 160], metavar="N", help="multiples of a head's width"
    )
    parser.add_argument("--head_dim", type=int, default=32, metavar="N", help="a head's width; there is a layer for each; 800m: 64")
    parser.add_argument("--held_out", type=int, metavar="N", help="one of them, which the law must predict without having seen it")
    parser.add_argument(
        "--tokens", type=float, nargs="+", default=[4e5, 8e5, 1.6e6], metavar="T", help="of a run, with its schedule"
    )
    parser.add_argument(
        "--rate_exponent",
        type=float,
        default=0.0,
        metavar="X",
        help="the JSON's learning rate is the smallest width's, another has it times (smallest / width)^X; muP's matrices: 1",
    )
    parser.add_argument("--learning_rates", type=float, nargs="*", default=[], metavar="LR", help="tried on the smallest width")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[], metavar="N", help="samples a step, tried on the smallest width"
    )
    parser.add_argument("--target_tokens", type=float, default=20e9, metavar="T", help="at which 60m and 800m are predicted")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of weights and data order")
    parser.add_argument("--draws", type=int, default=100, metavar="N", help="bootstrapped laws behind an interval")


def family(hidden: int, vocabulary: int, positions: int, head_dim: int) -> MoEGPTConfig:
    """The member of this width. Raises UserError for a width that is no multiple of a head's."""
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"--head_dim {head_dim} must be even and at least 2: positions turn pairs")
    if hidden < head_dim or hidden % head_dim:
        raise UserError(f"--hidden {hidden} must be a multiple of {head_dim}, the width of a head")
    heads = hidden // head_dim
    keys = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(1, heads / 3))
    return MoEGPTConfig.preset(
        "800m",
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=heads,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head_dim,
        moe_intermediate_size=max(8, round(hidden / 3 / 8) * 8),
        intermediate_size=round(hidden * 8 / 3),
        max_position_embeddings=positions,
        rope_parameters=None,
        router_bias_rate=0.01,  # short runs: CONTRIBUTING.md's log
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    check(arguments)
    rungs = plan_runs(arguments)
    tuning = plan_tuning(arguments, rungs[min(arguments.hidden), min(arguments.tokens)])
    with claimed((*rungs.values(), *tuning)):
        for one in (*rungs.values(), *tuning):
            one.train(one.steps)
    points = {key: (float(one.active), float(key[1]), one.result()["bits"][-1]) for key, one in rungs.items()}
    preferred = best_settings(tuning) if tuning else None
    result = climb(points, held_out=arguments.held_out, draws=arguments.draws, preferred=preferred)
    result["predictions"] = predict(result, arguments)
    show(result)
    return result


def check(arguments: argparse.Namespace) -> None:
    """Everything that can be wrong before hours of training."""
    sizes = {n for n in arguments.hidden if n != arguments.held_out}
    if arguments.held_out is not None and arguments.held_out not in arguments.hidden:
        raise UserError(f"--held_out {arguments.held_out} must be one of --hidden {' '.join(map(str, arguments.hidden))}")
    if len(sizes) < 2 or len(set(arguments.tokens)) < 2 or len(sizes) * len(set(arguments.tokens)) < 5:
        raise UserError("a law needs two widths, two token counts and five runs at least, beside the width that is held out")


def plan_runs(arguments: argparse.Namespace) -> dict[tuple[int, float], SmallRun]:
    """By width and tokens."""
    vocabulary = PackedDataset(arguments.data, split="train", sequence_length=arguments.sequence_length).vocab_size
    settings = read_config(arguments.deepspeed_config)
    batch = settings.get("train_batch_size")
    if not isinstance(batch, int):
        raise UserError(f"{arguments.deepspeed_config}: the ladder needs a train_batch_size that is a number, got {batch!r}")
    if arguments.rate_exponent and not isinstance(lookup(settings, "optimizer.params.lr"), float):
        raise UserError(f"{arguments.deepspeed_config}: --rate_exponent needs optimizer.params.lr, the smallest width's")

    def make(hidden: int, tokens: float) -> SmallRun:
        own, name = settings, f"tokens_{tokens:.0f}"
        if arguments.rate_exponent:
            rate = rate_of(hidden, min(arguments.hidden), settings["optimizer"]["params"]["lr"], arguments.rate_exponent)
            own = merged(settings, {"optimizer": {"params": {"lr": rate}}})
            name += f"_lr_{rate:.3g}"  # beside the runs of a ladder at one rate
        return SmallRun(
            folder=arguments.folder / f"hidden_{hidden}" / name,
            config=family(hidden, vocabulary, arguments.sequence_length, arguments.head_dim),
            deepspeed=own,
            data=tuple(arguments.data),
            steps=max(1, round(tokens / batch / arguments.sequence_length)),
            seed=arguments.seed,
            sequence_length=arguments.sequence_length,
            evaluations=1,
            eval_batches=arguments.eval_batches,
            ranks=arguments.ranks,
        )

    return {
        (hidden, tokens): make(hidden, tokens) for hidden in sorted(set(arguments.hidden)) for tokens in sorted(arguments.tokens)
    }


def rate_of(hidden: int, smallest: int, rate: float, exponent: float) -> float:
    """The learning rate of a width, from that of the smallest."""
    return float(rate * (smallest / hidden) ** exponent)


def plan_tuning(arguments: argparse.Namespace, base: SmallRun) -> list[SmallRun]:
    """The smallest run again, under every learning rate and batch that is to be tried, for the same tokens."""
    if not arguments.learning_rates and not arguments.batches:
        return []
    own_batch = base.deepspeed["train_batch_size"]
    own_rate = base.deepspeed["optimizer"]["params"]["lr"]
    made = []
    for batch in arguments.batches or [own_batch]:
        for rate in arguments.learning_rates or [own_rate]:
            settings = merged(base.deepspeed, {"train_batch_size": batch, "optimizer": {"params": {"lr": rate}}})
            folder = arguments.folder / "tuning" / f"batch_{batch}_lr_{rate:g}"
            made.append(replace(base, folder=folder, deepspeed=settings, steps=max(1, base.steps * own_batch // batch)))
    return made


def best_settings(tuning: list[SmallRun]) -> dict[str, float]:
    best = min(tuning, key=lambda one: one.result()["bits"][-1])
    batch_tokens = best.deepspeed["train_batch_size"] * best.sequence_length
    rate = best.deepspeed["optimizer"]["params"]["lr"]
    flops = best.flops_per_token * batch_tokens * best.steps
    return {"learning_rate": float(rate), "batch_tokens": float(batch_tokens), "flops": float(flops)}


def climb(
    points: dict[tuple[int, float], Point], *, held_out: int | None, draws: int, preferred: dict[str, float] | None = None
) -> dict[str, Any]:
    """What `Ladder.read` reads: the law through all widths but the held-out one, its bootstrap, how far it is off on that one."""
    seen = [point for (hidden, _), point in points.items() if hidden != held_out]
    unseen = [point for (hidden, _), point in points.items() if hidden == held_out]
    try:
        law = fit(seen)
    except ValueError as error:
        measured = ", ".join(f"{hidden} at {tokens:.3g}: {bits:.3f}" for (hidden, tokens), (_, _, bits) in points.items())
        raise UserError(f"{error}; bits per byte by width and tokens: {measured}") from error
    errors = [law.bits(active, tokens) / bits - 1 for active, tokens, bits in unseen]
    return {
        "law": law.to_json(),
        "bootstrap": [other.to_json() for other in bootstrap(seen, law, draws=draws)],
        "largest": {"active": max(p[0] for p in points.values()), "tokens": max(p[1] for p in points.values())},
        "held_out_error": max(map(abs, errors)) if errors else None,
        "preferred": preferred,
        "points": [{"hidden": hidden, "active": n, "tokens": d, "bits": bits} for (hidden, _), (n, d, bits) in points.items()],
        "held_out": held_out,
    }


def as_ladder(result: dict[str, Any]) -> Ladder:
    laws = [Law(**law) for law in result["bootstrap"]]
    given = {name: result[name] for name in ("largest", "held_out_error", "preferred")}
    return Ladder(law=Law(**result["law"]), bootstrap=laws, **given)


def predict(result: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    ladder, tokens = as_ladder(result), arguments.target_tokens
    found = {}
    for name in LARGE:
        config = MoEGPTConfig.preset(name)
        flops = tokens * training_flops_per_token(config, 2048)
        found[name] = {"target_tokens": tokens, **ladder.expectation(active_parameters(config), tokens, flops)}
    return found


def show(result: dict[str, Any]) -> None:
    from launch.benchmarks.measure import print_table

    law = Law(**result["law"])
    rows = [
        [p["hidden"], f"{p['active'] / 1e6:.3f}M", f"{p['tokens'] / 1e6:.3g}M", p["bits"], law.bits(p["active"], p["tokens"])]
        for p in result["points"]
    ]
    print_table("validation bits per byte", ["width", "active", "tokens", "measured", "law"], rows)
    print("bits = {E:.3f} + {A:.4g} / N^{alpha:.3f} + {B:.4g} / D^{beta:.3f}".format(**result["law"]))
    if result["held_out_error"] is not None:
        print(f"width {result['held_out']} was not fitted: off by {result['held_out_error']:.1%} at most")
    for name, found in result["predictions"].items():
        print("\n".join([f"{name}:", *(f"  {line}" for line in in_words(found, tokens=found["target_tokens"]))]))
