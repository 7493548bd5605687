"""What `launch/benchmark.py ladder` found, and what it says of a larger model: bits per byte, learning rate, batch.

    bits(N, D) = E + A / N^alpha + B / D^beta      (Chinchilla's form, arXiv 2203.15556)

N active parameters without the input embedding, D tokens.

The learning rate goes by width, as it did within the family: what the smallest width preferred, times (smallest / width)^X with
the family's own X (0: one rate for all; 1: muP's rule for matrices, arXiv 2203.03466). So a large model is one more member of what
the law was fitted to. The batch goes by the compute C of a run, with DeepSeek LLM's exponent (arXiv 2401.02954, section 3.1):
batch ~ C^0.327. That paper's rate ~ C^-0.125 would be a second rule for the same number, and is not used.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.cli import NotFound, UserError, sentence
from data.files import read_json
from model.accounting import count_parameters

if TYPE_CHECKING:
    from model.accounting import Config

BATCH_EXPONENT = 0.3271
#: A law that is further off than this on the size it did not see or on those that it did, whose floor E is lower, or one of whose
#: exponents is larger (published ones lie between 0.05 and 0.7) predicts nothing.
HELD_OUT_ERROR, FLOOR, EXPONENT = 0.02, 1e-3, 1.0
#: Times the parameters, or the tokens, of the largest run. Both together are 10,000 times its compute, the farthest that a
#: published prediction came true (GPT-4's report, arXiv 2303.08774, section 3.1).
FARTHEST = 100.0
#: Readings of the same data after which another is worth clearly less than new data (arXiv 2305.16264).
EPOCHS = 4.0
LARGEST_LOGARITHM = 700.0  # of what a float holds
SHARE = 0.9  # of the bootstrapped laws lies within an interval


@dataclass(frozen=True, kw_only=True)
class Law:
    """Validation bits per byte of `active` parameters after `tokens` tokens."""

    A: float
    B: float
    E: float
    alpha: float
    beta: float

    def bits(self, active: float, tokens: float) -> float:
        return self.E + _power(self.A, active, self.alpha) + _power(self.B, tokens, self.beta)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """As the file has it. `held_out_error` is the largest relative error on a size that was not fitted; None if there was none.

    What has a default is missing from older files.
    """

    law: Law
    bootstrap: list[Law]
    largest: dict[str, float]  # active parameters and tokens of the largest runs
    held_out_error: float | None
    preferred: dict[str, float] | None  # learning_rate, batch_tokens, flops, tokens: of the smallest width's best run
    # width and widest, learning_rate (of width), rate_exponent, batch_tokens, head_dim, vocabulary
    family: dict[str, Any] | None = None
    held_out_step: float | None = None  # times the parameters of the nearest fitted size; 1 for a size between fitted ones
    epochs: float | None = None  # how often the longest runs read their data
    fit_error: float | None = None  # the largest relative error on what was fitted

    @classmethod
    def read(cls, path: Path) -> Ladder:
        """Raises UserError where the file is no ladder's."""
        try:
            found = read_json(path)
            values = {one.name: found[one.name] for one in fields(cls) if one.name in found or one.default is MISSING}
            laws = [Law(**law) for law in values["bootstrap"]]
            made = cls(**{**values, "law": Law(**values["law"]), "bootstrap": laws})
            made.expectation(1e6, 1e6, 1e12, 64, 512)  # which uses every number in it
            return made
        except FileNotFoundError as error:
            raise NotFound(f"--ladder {path} is not a file; launch/benchmark.py ladder --output writes one") from error
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            why = f"{type(error).__name__}: {sentence(error)}"
            raise UserError(f"--ladder {path} is not what launch/benchmark.py ladder --output writes ({why})") from error

    def doubts(self, beyond: Mapping[str, float], vocabulary: int) -> list[str]:
        """Why this law is no prediction so many times beyond its largest run, in words; empty where nothing speaks against it."""
        found = []
        if self.held_out_error is None:
            found.append("no size was held out: the law was checked on nothing that it did not see")
        elif self.held_out_error > HELD_OUT_ERROR:
            found.append(f"the law is {self.held_out_error:.1%} off on the size that it did not see, over {HELD_OUT_ERROR:.0%}")
        if (self.fit_error or 0.0) > HELD_OUT_ERROR:
            found.append(
                f"the law is {self.fit_error:.1%} off on what it was fitted to, over {HELD_OUT_ERROR:.0%}: some of its runs may "
                "have learned what others had not begun to, such as to copy from the context; longer runs have it all"
            )
        if self.held_out_step == 1:
            found.append("the size that was held out lies between those that were fitted: nothing beyond them was checked")
        for what, times in beyond.items():
            if times > FARTHEST:
                found.append(
                    f"{_times(times)} the {what} of the largest run, over {FARTHEST:g}: no law is known to have held so far"
                )
        own = (self.family or {}).get("vocabulary", vocabulary)  # an older file does not say
        if own != vocabulary:
            found.append(
                f"its runs' vocabulary has {own:,} tokens, this model's {vocabulary:,}: D and N are counts of other things"
            )
        if (self.epochs or 0.0) > EPOCHS:
            found.append(f"its longest runs read their data {self.epochs:.3g} times, over {EPOCHS:g}: the law takes that for new")
        if self.law.E < FLOOR:
            found.append(f"the law has no floor (E is {self.law.E:.2g}): its runs do not reach where one would show")
        for what, exponent in (("parameters", self.law.alpha), ("tokens", self.law.beta)):
            if not 0 < exponent <= EXPONENT:
                found.append(f"the law's exponent of the {what} is {exponent:.3g}: its runs do not tell what more of them do")
        return found

    def expectation(self, active: float, tokens: float, flops: float, width: int, vocabulary: int) -> dict[str, Any]:
        """`bits_per_byte`, its interval, how many times beyond the largest run that is, and the rate and batch to begin with.

        The interval has the bootstrapped laws' middle 90 % and, on either side, `form_error`.
        """
        laws = sorted(law.bits(active, tokens) for law in self.bootstrap)
        edge = (1 - SHARE) / 2
        middle = self.law.bits(active, tokens)
        low, high = (_quantile(laws, q) for q in (edge, 1 - edge)) if laws else (middle, middle)
        beyond = {"parameters": active / self.largest["active"], "tokens": tokens / self.largest["tokens"]}
        wider = 1 + self.form_error(beyond)
        found = {
            "bits_per_byte": middle,
            "low": min(low, middle) / wider,
            "high": max(high, middle) * wider,
            "doubts": self.doubts(beyond, vocabulary),
            "beyond": beyond,
        }
        return found | self.beginning(flops, width) if self.preferred else found

    def form_error(self, beyond: Mapping[str, float]) -> float:
        """How far the law may be off for its form alone, which no bootstrap knows: as far as on the held-out size, compounded.

        That size lay one step, `held_out_step` times the parameters, from what was fitted. As many such steps as the logarithmic
        distance of a target holds, of parameters and tokens together, may each add the same error.
        """
        if not self.held_out_error:
            return 0.0
        steps = 1.0
        if self.held_out_step and self.held_out_step > 1:
            steps += sum(math.log(max(1.0, times)) for times in beyond.values()) / math.log(self.held_out_step)
        return math.expm1(min(steps * math.log1p(self.held_out_error), LARGEST_LOGARITHM / 2))

    def beginning(self, flops: float, width: int) -> dict[str, Any]:
        """Learning rate and batch to begin with, and `rate_rule` in words; no rate where the file does not say the family's."""
        assert self.preferred is not None
        best, batch = self.preferred["learning_rate"], self.preferred["batch_tokens"]
        found: dict[str, Any] = {"batch_tokens": batch * (flops / self.preferred["flops"]) ** BATCH_EXPONENT}
        if self.family is None:
            return found | {"learning_rate": None, "rate_rule": "an older file, which does not say how the family's went by width"}
        small, widest, exponent = (self.family[name] for name in ("width", "widest", "rate_exponent"))
        rule = f"{best:.2g} at {batch:,.0f} tokens a step x ({small} / {width})^{exponent:g}, as the family up to width {widest}"
        return found | {"learning_rate": best * (small / width) ** exponent, "rate_rule": rule}


def _times(ratio: float) -> str:
    """`12,500 x`, and `1.2e+09 x` where nobody would count the digits."""
    return f"{ratio:,.0f} x" if 100 <= ratio < 1e7 else f"{ratio:.3g} x"


def _bits(value: float) -> str:
    """`1.568`, and `1.34e+38` where a law says nothing."""
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def _power(factor: float, count: float, exponent: float) -> float:
    """`factor / count^exponent`, with a fitted law's odd numbers too: 1e177 / 1e6^34."""
    return math.exp(min(math.log(factor) - exponent * math.log(count), LARGEST_LOGARITHM)) if factor > 0 else 0.0


def active_parameters(config: Config) -> int:
    """N: what a token meets, without the input embedding, which multiplies nothing."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return count_parameters(config).active - embedding


def _quantile(ordered: list[float], share: float) -> float:
    if len(ordered) < 2:
        return ordered[0]
    cuts = statistics.quantiles(ordered, n=1000, method="inclusive")
    return cuts[min(len(cuts) - 1, max(0, round(share * 1000) - 1))]


def in_words(found: dict[str, Any], *, tokens: float) -> list[str]:
    """Lines for a terminal: one, one for each doubt, and one of rate and batch where these were tried."""
    beyond, between = found["beyond"], f"{_bits(found['low'])} to {_bits(found['high'])}"
    lines = [
        f"expected after {tokens:.3g} tokens: {_bits(found['bits_per_byte'])} bits per byte, {between} "
        f"({_times(beyond['parameters'])} the parameters and {_times(beyond['tokens'])} the tokens of the largest run measured)"
    ]
    lines += [f"not to be believed: {doubt}" for doubt in found["doubts"]]
    if "batch_tokens" in found:
        rate = "no learning rate" if found["learning_rate"] is None else f"learning rate {found['learning_rate']:.2g}"
        lines.append(f"to begin with: {rate} ({found['rate_rule']}), {found['batch_tokens']:,.0f} tokens a step (by compute)")
    return lines
