"""How to draw tokens: the settings, their defaults and what each may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.cli import UserError

#: Logits over less than this can be more than a float holds.
LEAST_TEMPERATURE = LEAST_PENALTY = 1e-5
MOST_PENALTY = 1e5  # and those below 0 times more


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0: always the likeliest token. top_p 1, top_k 0, min_p 0, repetition_penalty 1: no limit."""

    max_new_tokens: int = 128
    temperature: float = 0.2
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "num_return_sequences": (self.num_return_sequences >= 1, "at least 1"),
            "temperature": (
                self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < float("inf"),
                f"0 (the likeliest token) or at least {LEAST_TEMPERATURE}",
            ),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (-(1 << 63) <= self.seed < 1 << 63, "a number of 64 bits"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (
                LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY,
                f"from {LEAST_PENALTY} to {MOST_PENALTY:,.0f}",
            ),
        }
        for name, (holds, valid) in limits.items():
            if not holds:
                raise UserError(f"--{name} must be {valid}, not {getattr(self, name)}")
        if self.temperature == 0 and self.num_return_sequences > 1:
            raise UserError("--num_return_sequences above 1 needs --temperature above 0: the likeliest tokens are always the same")

    def keywords(self) -> dict[str, Any]:
        """For transformers' `generate`."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p or None}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            **(drawn if self.temperature > 0 else dict.fromkeys(drawn)),
        }
