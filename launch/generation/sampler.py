"""Continue prompts in a left-padded batch, with a cache whose memory follows what is used."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from data.cli import UserError
from launch.generation.decode import fast
from launch.generation.stop import NewText, StopStrings, Stream, cut

#: Logits over less than this can be more than a float holds.
LEAST_TEMPERATURE = LEAST_PENALTY = 1e-5
MOST_PENALTY = 1e5  # and those below 0 times more
SEEDS = "a number of 64 bits"
TEMPERATURES = f"0 (the likeliest token) or at least {LEAST_TEMPERATURE}"


#: Positions of all rows together that one batch may take: more sequences follow one another, so that the cache stays in memory.
BATCH_POSITIONS = 65_536


def may_be_seed(value: int) -> bool:
    """As torch takes it: signed, and no more than 64 bits."""
    return -(1 << 63) <= value < 1 << 63


def may_be_temperature(value: float) -> bool:
    return value == 0 or LEAST_TEMPERATURE <= value < float("inf")


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
            "temperature": (may_be_temperature(self.temperature), TEMPERATURES),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (may_be_seed(self.seed), SEEDS),
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


@dataclass(frozen=True, kw_only=True)
class Completion:
    """`tokens`: up to the one that ended it. `finish`: eos (the model ended), stop (a stop string, which is cut off) or length."""

    prompt: int
    text: str
    tokens: int
    finish: str


class TextPenalty(RepetitionPenaltyLogitsProcessor):
    """transformers' repetition penalty, but not of the padding, which is the end token: a row would end another time than alone."""

    def __init__(self, penalty: float, padded: torch.Tensor, copies: int) -> None:
        super().__init__(penalty)
        self.padded = padded.repeat_interleave(copies, dim=0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        width = self.padded.shape[1]
        prompt = torch.where(self.padded.to(input_ids.device), input_ids[:, width - 1 : width], input_ids[:, :width])  # once more
        penalised: torch.Tensor = super().__call__(torch.cat((prompt, input_ids[:, width:]), dim=1), scores)
        return penalised


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    sampling: Sampling,
    stream: Stream | None = None,
) -> tuple[list[Completion], float]:
    """`num_return_sequences` completions of each prompt, in order, and the seconds that they took.

    Raises UserError where a prompt leaves too little room in the model's context.
    """
    longest = max(len(ids) for ids in prompts)
    check_length(model, longest, sampling.max_new_tokens)
    torch.manual_seed(sampling.seed)
    started = time.perf_counter()
    new_text, ends = NewText(tokenizer), end_ids(model)
    completions: list[Completion] = []
    for part, copies in batches(
        len(prompts), sampling.num_return_sequences, BATCH_POSITIONS // (longest + sampling.max_new_tokens)
    ):
        stops = [sampling.stop] * (len(part) * copies)
        rows = new_tokens(model, tokenizer, [prompts[i] for i in part], sampling, stops, stream)
        for i, row in enumerate(rows):
            prompt = part[i // copies]
            completions.append(finished(new_text, row, prompt, ends, sampling.stop, last=prompts[prompt][-1]))
    return completions, time.perf_counter() - started


def batches(prompts: int, copies: int, most: int) -> Iterator[tuple[range, int]]:
    """`(prompts, copies of each)`, in order and of at most `most` sequences each, but at least one."""
    if copies <= most:
        step = most // copies
        yield from ((range(first, min(first + step, prompts)), copies) for first in range(0, prompts, step))
    else:
        most = max(most, 1)
        for prompt in range(prompts):
            yield from ((range(prompt, prompt + 1), min(most, copies - done)) for done in range(0, copies, most))


def new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    sampling: Sampling,
    stops: Sequence[Sequence[str]],
    stream: Stream | None = None,
) -> list[list[int]]:
    """The new tokens of each sequence, in one batch. `stops`: each sequence's; there are as many of each prompt, side by side."""
    longest = max(len(ids) for ids in prompts)
    ends = end_ids(model)
    pad = ends[0] if ends else 0
    ids, mask = left_padded(prompts, longest, pad)
    copies = len(stops) // len(prompts)
    processors = [TextPenalty(sampling.repetition_penalty, mask == 0, copies)] if sampling.repetition_penalty != 1 else []
    criteria = [StopStrings(tokenizer, stops, longest)] if any(stops) else []
    generating: Any = model  # typed as a module, whose attributes may be tensors
    out = generating.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        eos_token_id=ends or None,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList(criteria),
        logits_processor=LogitsProcessorList(processors),
        num_return_sequences=copies,
        **fast(model, stream),
        **sampling.keywords(),
    )
    new: list[list[int]] = out[:, longest:].tolist()
    return new


def check_length(model: PreTrainedModel, prompt: int, new: int) -> None:
    longest = model.config.max_position_embeddings
    if prompt + new > longest:
        raise UserError(
            f"{prompt} prompt tokens and --max_new_tokens {new} are beyond the model's {longest} positions; ask for fewer tokens, "
            "or extend the context with --rope_factor"
        )


def end_ids(model: PreTrainedModel) -> list[int]:
    end = model.config.eos_token_id
    return [] if end is None else list(end) if isinstance(end, (list, tuple)) else [end]


def left_padded(prompts: list[list[int]], longest: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)`, each `[prompts, longest]`; 0 in the mask is padding."""
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def finished(new_text: NewText, row: list[int], prompt: int, ends: list[int], stops: Sequence[str], *, last: int) -> Completion:
    """A row of new tokens behind the prompt's `last` one up to its end; what follows in a batch is padding."""

    def is_stopped(count: int) -> bool:
        return cut(new_text.of(row[:count], last=last), stops)[1]

    end = next((i for i, token in enumerate(row) if token in ends), len(row))
    text, stopped = cut(new_text.of(row[:end], last=last), stops)
    reason = "stop" if stopped else "eos" if end < len(row) else "length"
    tokens = bisect_left(range(end), True, key=is_stopped) if stopped else min(end + 1, len(row))
    return Completion(prompt=prompt, text=text, tokens=tokens, finish=reason)
