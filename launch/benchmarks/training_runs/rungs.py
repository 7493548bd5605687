"""The trainings of `launch/benchmark.py ladder`'s family.

Everything that can be wrong is said here, before hours of training.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from data.cli import UserError
from launch.benchmarks.training_runs.small_runs import SmallRun, check_counts, check_seeds
from launch.benchmarks.training_runs.variants import merged
from launch.engine.strategy import read_config
from launch.nested import lookup
from model import MoEGPTConfig

RATE = "optimizer.params.lr"
LEAST_RATE, MOST_RATE = 1e-12, 1e3  # of a learning rate, beyond which an exponent is a slip
Rungs = dict[tuple[int, float], SmallRun]  # by width and the tokens asked for


def family(hidden: int, vocabulary: int, positions: int, head_dim: int) -> MoEGPTConfig:
    """The member of this width. Raises UserError for a width that is no multiple of a head's."""
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"--head_dim {head_dim} must be even and at least 2: RoPE rotates pairs of dimensions")
    if hidden < head_dim or hidden % head_dim:
        raise UserError(f"--hidden {hidden} must be a multiple of {head_dim}, the width of a head (--head_dim)")
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
        router_bias_rate=0.01,  # short runs: tests/results/README.md
    )


def check(arguments: argparse.Namespace) -> None:
    """The flags by themselves. Raises UserError."""
    check_counts(arguments, "draws")
    numbers = {"tokens": arguments.tokens, "target_tokens": [arguments.target_tokens], "learning_rates": arguments.learning_rates}
    numbers |= {"batches": arguments.batches, "tune_tokens": [] if arguments.tune_tokens is None else [arguments.tune_tokens]}
    for name, given in numbers.items():
        for value in given:
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name} must be over 0, got {value:g}")
    check_seeds(arguments.seeds)
    if not math.isfinite(arguments.rate_exponent):
        raise UserError(f"--rate_exponent must be a number such as 0.5, got {arguments.rate_exponent}")
    if arguments.rate_hidden is not None and (arguments.rate_hidden < 1 or not arguments.rate_exponent):
        raise UserError(f"--rate_hidden {arguments.rate_hidden} must be a width, and goes with --rate_exponent")
    if arguments.tune_tokens is not None and not (arguments.learning_rates or arguments.batches):
        raise UserError("--tune_tokens is of what --learning_rates and --batches try; give one of them, or leave it out")
    if arguments.tune_hidden and not arguments.learning_rates:
        raise UserError("--tune_hidden is of what --learning_rates tries; give it, or leave this out")
    if other := sorted(set(arguments.tune_hidden) - set(arguments.hidden)):
        raise UserError(f"--tune_hidden {other[0]} must be one of --hidden {' '.join(map(str, arguments.hidden))}")
    held_out = held_out_width(arguments)
    fitted = {n for n in arguments.hidden if n != held_out}
    if arguments.held_out_tokens and (held_out is None or set(arguments.held_out_tokens) - set(arguments.tokens)):
        given = " ".join(f"{t:g}" for t in arguments.held_out_tokens)
        raise UserError(f"--held_out_tokens {given} must be some of --tokens, and goes with a width that is held out (--held_out)")
    if min(len(fitted), len(set(arguments.tokens))) < 3:
        beside = f", beside width {held_out}, which is held out (--held_out)" if held_out else ""
        widths = " ".join(map(str, sorted(set(arguments.hidden))))
        counts = " ".join(f"{t:g}" for t in sorted(set(arguments.tokens)))
        raise UserError(
            f"a law of five numbers needs three widths and three token counts at least{beside}: got --hidden {widths} and "
            f"--tokens {counts}"
        )


def held_out_width(arguments: argparse.Namespace) -> int | None:
    """Of `--held_out`. Raises UserError."""
    said = arguments.held_out
    if said == "none":
        return None
    widths: dict[str, int] = {str(n): n for n in arguments.hidden} | {"largest": max(arguments.hidden)}
    if said not in widths:
        raise UserError(f"--held_out {said} must be one of --hidden {' '.join(map(str, arguments.hidden))}, or largest, or none")
    return widths[said]


def plan_runs(arguments: argparse.Namespace, vocabulary: int) -> Rungs:
    """Raises UserError, also for a batch that cannot be shared out. `vocabulary`: of the shards."""
    settings, held_out = base_settings(arguments), held_out_width(arguments)
    counts = sorted(set(arguments.tokens))
    rungs = {
        (hidden, tokens): plan_run(arguments, settings, vocabulary, hidden, tokens)
        for hidden in sorted(set(arguments.hidden))
        for tokens in counts
        if hidden != held_out or tokens in (arguments.held_out_tokens or counts)
    }
    if len({one.steps for one in rungs.values()}) < len(counts):
        step = settings["train_batch_size"] * arguments.sequence_length
        raise UserError(f"--tokens {' '.join(f'{t:g}' for t in counts)}: some are the same number of steps of {step:,} tokens")
    return rungs


def base_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON, with numbers where a width's own are made of them. Raises UserError."""
    settings = read_config(arguments.deepspeed_config)
    batch = settings.get("train_batch_size")
    if not isinstance(batch, int):
        raise UserError(f"{arguments.deepspeed_config}: the ladder needs a train_batch_size that is a number, got {batch!r}")
    for flag in ("rate_exponent", "learning_rates", "batches"):
        if getattr(arguments, flag) and not isinstance(lookup(settings, RATE), float):
            raise UserError(f"{arguments.deepspeed_config}: --{flag} needs {RATE}, the smallest width's, as a number")
    return settings


def plan_run(arguments: argparse.Namespace, settings: dict[str, Any], vocabulary: int, hidden: int, tokens: float) -> SmallRun:
    """One rung. Raises UserError for a width that is none, and for a rate that cannot be meant."""
    name = f"tokens_{tokens:.0f}"
    if arguments.rate_exponent:
        rate = rate_of(hidden, arguments.rate_hidden or min(arguments.hidden), lookup(settings, RATE), arguments.rate_exponent)
        if not LEAST_RATE < rate < MOST_RATE:
            raise UserError(f"--rate_exponent {arguments.rate_exponent:g} gives width {hidden} a learning rate of {rate:.3g}")
        settings = merged(settings, {"optimizer": {"params": {"lr": rate}}})
        name += f"_lr_{rate:.3g}"  # beside the runs of a ladder at one rate
    return SmallRun(
        folder=arguments.folder / f"hidden_{hidden}" / name,
        config=family(hidden, vocabulary, arguments.sequence_length, arguments.head_dim),
        model=f"of width {hidden}",
        deepspeed=settings,
        deepspeed_config=arguments.deepspeed_config,
        data=tuple(arguments.data),
        steps=max(1, round(tokens / settings["train_batch_size"] / arguments.sequence_length)),
        seed=arguments.seeds[0],
        sequence_length=arguments.sequence_length,
        evaluations=1,
        eval_batches=arguments.eval_batches,
        ranks=arguments.ranks,
    )


def with_seeds(rungs: Rungs, seeds: list[int]) -> dict[tuple[int, float], list[SmallRun]]:
    """Each rung with every seed; the first's is the rung itself."""
    return {
        key: [one, *(replace(one, seed=seed, folder=one.folder.with_name(f"{one.folder.name}_seed_{seed}")) for seed in seeds[1:])]
        for key, one in rungs.items()
    }


def longest_of(rungs: Rungs, hidden: int) -> SmallRun:
    """The run of a width for the most tokens."""
    return max((one for (width, _), one in rungs.items() if width == hidden), key=lambda one: one.tokens)


def rate_of(hidden: int, smallest: int, rate: float, exponent: float) -> float:
    """The learning rate of a width, from that of the smallest; infinite where a float does not hold it."""
    try:
        return float(rate * (smallest / hidden) ** exponent)
    except OverflowError:
        return math.inf


def family_facts(arguments: argparse.Namespace, rungs: Rungs) -> dict[str, Any]:
    """What `launch.planning.ladder.Ladder` needs of the family, beside its law."""
    smallest = longest_of(rungs, min(arguments.hidden))
    return {
        "width": min(arguments.hidden),
        "widest": max(arguments.hidden),
        "head_dim": arguments.head_dim,
        "vocabulary": smallest.config.vocab_size,
        "learning_rate": lookup(smallest.deepspeed, RATE),
        "rate_exponent": arguments.rate_exponent,
        "batch_tokens": smallest.batch * arguments.sequence_length,
    }
