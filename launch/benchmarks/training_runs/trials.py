"""Learning rates and batches that `launch/benchmark.py ladder` tries: which is best, and how the best rate goes by width.

A rate is named as the smallest width's; another width tries it by the family's rule (`--rate_exponent`). So where the rule is right
all widths prefer the same name, muP's check of itself (arXiv 2203.03466, figure 1), and how far it is off is fitted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data.cli import counted
from data.terminal import say
from launch.benchmarks.training_runs.rungs import RATE, Rungs, longest_of, rate_of
from launch.benchmarks.training_runs.small_runs import SmallRun
from launch.benchmarks.training_runs.variants import merged
from launch.nested import lookup

Trials = dict[tuple[int, float, int], SmallRun]  # by width, the rate as the smallest width has it, and samples a step


def plan_trials(arguments: argparse.Namespace, rungs: Rungs) -> Trials:
    """Rates and batches on the smallest width, rates on those of `--tune_hidden` too, for as many tokens as the longest run.

    The shorter a run, the higher the rate that it prefers. A run that the family has already is not trained twice.
    """
    if not arguments.learning_rates and not arguments.batches:
        return {}
    smallest = min(arguments.hidden)
    longest = {hidden: longest_of(rungs, hidden) for hidden in sorted({smallest, *arguments.tune_hidden})}
    rates = dict.fromkeys(arguments.learning_rates or [float(lookup(longest[smallest].deepspeed, RATE))])
    made: Trials = {}
    for hidden, family_run in longest.items():
        batches = [family_run.batch]  # at which widths are compared
        if hidden == smallest and arguments.batches:
            batches = [*batches, *arguments.batches] if arguments.tune_hidden else arguments.batches
        for batch in dict.fromkeys(batches):
            for rate in rates:
                asked = plan_trial(arguments, family_run, rate, batch)
                own = (one for one in rungs.values() if replace(asked, folder=one.folder) == one)
                made[hidden, rate, batch] = next(own, asked)
    return made


def plan_trial(arguments: argparse.Namespace, family_run: SmallRun, rate: float, batch: int) -> SmallRun:
    smallest, hidden = min(arguments.hidden), family_run.config.hidden_size
    own = rate_of(hidden, smallest, rate, arguments.rate_exponent)
    tokens = arguments.tune_tokens or max(arguments.tokens)
    settings = merged(family_run.deepspeed, {"train_batch_size": batch, "optimizer": {"params": {"lr": own}}})
    width = "" if hidden == smallest else f"hidden_{hidden}_"
    folder = arguments.folder / "tuning" / f"{width}tokens_{tokens:.0f}_batch_{batch}_lr_{own:g}"
    steps = max(1, round(tokens / batch / family_run.sequence_length))
    return replace(family_run, deepspeed=settings, steps=steps, folder=folder)


def announce(family: Sequence[SmallRun], trials: Trials, times_read: float) -> None:
    """What it will cost, and whether the data are enough for it."""
    trained = list({one.folder: one for one in (*family, *trials.values())}.values())
    flops = {one.folder: one.flops for one in trained}
    done = sum(one.is_done(one.steps) for one in trained)
    words = f"{counted(len(trained), 'run')}, {sum(flops.values()):.2g} FLOPs"
    extra = [one for one in trials.values() if one not in family]
    if extra:
        share = sum(flops[one.folder] for one in extra) / sum(flops.values())
        widths = " ".join(str(hidden) for hidden in dict.fromkeys(hidden for hidden, _, _ in trials))
        words += (
            f": {len(family)} of the family, {len(extra)} more to try rates and batches on width {widths} for "
            f"{extra[0].tokens / 1e6:.3g} M tokens ({share:.0%})"
        )
    say(words + (f"; already done: {done}" if done else ""))
    if times_read > 1:
        say(
            f"warning: the longest runs read the data {times_read:.3g} times, and the law takes that for new data; "
            "lower --tokens or give more --data"
        )


def judged(trials: Trials, failed: Mapping[str, str]) -> dict[str, Any]:
    """`trials`, what each came to; `preferred`, the best of the smallest width, None where no loss was finite; `best_rates` by
    width and `fitted_exponent`, what `--rate_exponent` would be by them (None for one width).

    `failed`: by name, why. Such a trial has no number of bits: mostly it diverged, which its training ends over, and it was tried.
    """
    tried = [
        {
            "hidden": hidden,
            "learning_rate": float(lookup(one.deepspeed, RATE)),
            "batch_tokens": float(batch * one.sequence_length),
            "tokens": float(one.tokens),
            "flops": one.flops,
            "bits": math.nan if one.name in failed else one.result()["bits"][-1],
            "failed": failed.get(one.name),
        }
        for (hidden, _, batch), one in trials.items()
    ]
    rates = best_rates(tried)
    return {
        "trials": tried,
        "preferred": best_of_smallest(tried),
        "best_rates": rates,
        "fitted_exponent": fitted_exponent(rates),
    }


def by_width(tried: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {hidden: [one for one in tried if one["hidden"] == hidden] for hidden in sorted({one["hidden"] for one in tried})}


def best_of_smallest(tried: list[dict[str, Any]]) -> dict[str, float] | None:
    smallest = next(iter(by_width(tried).values()), [])
    finite = [one for one in smallest if math.isfinite(one["bits"])]
    if not finite:
        return None
    best = min(finite, key=lambda one: float(one["bits"]))
    return {name: best[name] for name in ("learning_rate", "batch_tokens", "tokens", "flops")}


def best_rates(tried: list[dict[str, Any]]) -> dict[int, float]:
    """By width, at the batch that all of them tried; empty for a single width."""
    widths = by_width(tried)
    if len(widths) < 2:
        return {}
    common = set.intersection(*({one["batch_tokens"] for one in own} for own in widths.values()))
    rates = {
        hidden: lowest({one["learning_rate"]: one["bits"] for one in own if one["batch_tokens"] in common})
        for hidden, own in widths.items()
    }
    return {hidden: rate for hidden, rate in rates.items() if rate is not None}


def fitted_exponent(rates: dict[int, float]) -> float | None:
    """X of rate ~ (smallest / width)^X through the rates by width; None for fewer than two."""
    if len(rates) < 2:
        return None
    slope, _ = np.polyfit(np.log(list(rates)), np.log(list(rates.values())), 1)
    return -float(slope)


def lowest(curve: dict[float, float]) -> float | None:
    """The rate of least bits: the vertex of the parabola over log(rate) through the best one and its neighbours.

    The best one itself where a neighbour is missing or diverged, None where all diverged.
    """
    rates = sorted(curve)
    finite = [i for i, rate in enumerate(rates) if math.isfinite(curve[rate])]
    if not finite:
        return None
    best = min(finite, key=lambda i: curve[rates[i]])
    around = rates[max(0, best - 1) : best + 2]
    if len(around) < 3 or not all(math.isfinite(curve[rate]) for rate in around):
        return rates[best]
    bend, slope, _ = np.polyfit(np.log(around), [curve[rate] for rate in around], 2)
    return float(np.exp(-slope / (2 * bend))) if bend > 0 else rates[best]


def at_the_edge(tried: list[dict[str, Any]]) -> list[str]:
    """Where a width's best rate or batch is the least or the greatest that it tried, diverged or not: better may lie beyond."""
    said = []
    for hidden, own in by_width(tried).items():
        finite = [one for one in own if math.isfinite(one["bits"])]
        if not finite:
            continue
        best = min(finite, key=lambda one: float(one["bits"]))
        for name, what in (("learning_rate", "learning rate"), ("batch_tokens", "batch in tokens")):
            values = {one[name] for one in own}
            if len(values) > 1 and best[name] in (min(values), max(values)):
                which = "least" if best[name] == min(values) else "greatest"
                said.append(f"width {hidden}: the best {what}, {best[name]:g}, is the {which} that was tried: try beyond it")
    return said


def in_words(found: dict[str, Any], family: dict[str, Any]) -> list[str]:
    """What to do about the rate and the batch that were found best; nothing where none were tried. `found`: of `judged`."""
    tried, best = found["trials"], found["preferred"]
    if best is None:
        return ["no rate or batch that was tried ended with a finite loss: where they diverged, try lower rates"] if tried else []
    lines = at_the_edge(tried)
    of_law = {name: family[name] for name in ("learning_rate", "batch_tokens")}
    if of_law != {name: best[name] for name in of_law}:
        lines.append(
            f"width {family['width']} prefers learning rate {best['learning_rate']:g} and {best['batch_tokens']:,.0f} tokens a "
            f"step, the law is of {of_law['learning_rate']:g} and {of_law['batch_tokens']:,.0f}: put them into the JSON, name "
            "another --folder"
        )
    if found["fitted_exponent"] is not None:
        rates = ", ".join(f"{rate:.2g} for {hidden}" for hidden, rate in found["best_rates"].items())
        fitted = round(found["fitted_exponent"], 2) + 0.0  # no -0
        lines.append(
            f"best learning rates by width: {rates}; that is (smallest / width)^{fitted:.2f}, the family's is "
            f"^{family['rate_exponent']:g} (--rate_exponent)"
        )
    return lines
