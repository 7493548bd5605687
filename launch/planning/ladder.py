"""What `launch/benchmark.py ladder` found, and what it says of a larger model: bits per byte, learning rate, batch.

    bits(N, D) = E + A / N^alpha + B / D^beta      (Chinchilla's form, arXiv 2203.15556)

N active parameters without the input embedding, D tokens. Learning rate and batch go by the compute C of a run, from what the
small runs preferred, with DeepSeek LLM's exponents (arXiv 2401.02954, section 3.1): rate ~ C^-0.125, batch ~ C^0.327.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.cli import NotFound, UserError
from model.accounting import count_parameters

if TYPE_CHECKING:
    from model.accounting import Config

RATE_EXPONENT, BATCH_EXPONENT = -0.1250, 0.3271
#: A law that is further off than this on the size it did not see, whose floor E is lower, or one of whose exponents is larger
#: (published ones lie between 0.05 and 0.7) predicts nothing.
HELD_OUT_ERROR, FLOOR, EXPONENT = 0.02, 1e-3, 1.0
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

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """As the file has it. `held_out_error` is the largest relative error on a size that was not fitted; None if none was."""

    law: Law
    bootstrap: list[Law]
    largest: dict[str, float]  # active parameters and tokens of the largest runs
    held_out_error: float | None
    preferred: dict[str, float] | None  # learning_rate, batch_tokens, flops: of the small runs

    @classmethod
    def read(cls, path: Path) -> Ladder:
        """Raises UserError where the file is no ladder's."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            values = {field.name: found[field.name] for field in fields(cls)}
            laws = [Law(**law) for law in values["bootstrap"]]
            return cls(**{**values, "law": Law(**values["law"]), "bootstrap": laws})
        except FileNotFoundError as error:
            raise NotFound(f"--ladder {path} is not a file; launch/benchmark.py ladder --output writes one") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"--ladder {path} is not what launch/benchmark.py ladder --output writes ({error})") from error

    def doubts(self) -> list[str]:
        """Why this law is no prediction, in words; empty where nothing speaks against it."""
        found = []
        if (self.held_out_error or 0.0) > HELD_OUT_ERROR:
            found.append(f"the law is {self.held_out_error:.1%} off on the size that it did not see, over {HELD_OUT_ERROR:.0%}")
        if self.law.E < FLOOR:
            found.append(f"the law has no floor (E is {self.law.E:.2g}): its runs do not reach where one would show")
        for what, exponent in (("parameters", self.law.alpha), ("tokens", self.law.beta)):
            if not 0 < exponent <= EXPONENT:
                found.append(f"the law's exponent of the {what} is {exponent:.3g}: its runs do not tell what more of them do")
        return found

    def expectation(self, active: float, tokens: float, flops: float) -> dict[str, Any]:
        """`bits_per_byte`, its interval, how many times beyond the largest run that is, and the rate and batch to begin with.

        The interval has the bootstrapped laws' middle 90 % and, on either side, the error on the size that was held out: it knows
        nothing of what only shows at scale.
        """
        laws = sorted(law.bits(active, tokens) for law in self.bootstrap)
        edge = (1 - SHARE) / 2
        middle = self.law.bits(active, tokens)
        low, high = (_quantile(laws, q) for q in (edge, 1 - edge)) if laws else (middle, middle)
        wider = self.held_out_error or 0.0
        found = {
            "bits_per_byte": middle,
            "low": min(low, middle) * (1 - wider),
            "high": max(high, middle) * (1 + wider),
            "doubts": self.doubts(),
            "beyond": {"parameters": active / self.largest["active"], "tokens": tokens / self.largest["tokens"]},
        }
        if self.preferred:
            scale = flops / self.preferred["flops"]
            found["learning_rate"] = self.preferred["learning_rate"] * scale**RATE_EXPONENT
            found["batch_tokens"] = self.preferred["batch_tokens"] * scale**BATCH_EXPONENT
        return found


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
    """Lines for a terminal: two, and one for each doubt."""
    beyond, between = found["beyond"], f"{found['low']:.3f} to {found['high']:.3f}"
    lines = [
        f"expected after {tokens:.3g} tokens: {found['bits_per_byte']:.3f} bits per byte, {between} "
        f"({beyond['parameters']:,.3g} x the parameters and {beyond['tokens']:,.3g} x the tokens of the largest run measured)"
    ]
    lines += [f"not to be believed: {doubt}" for doubt in found["doubts"]]
    if "learning_rate" in found:
        lines.append(
            f"to begin with, by compute: learning rate {found['learning_rate']:.2g}, {found['batch_tokens']:,.0f} tokens a step"
        )
    return lines
