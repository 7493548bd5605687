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
from launch.generation.sampling import Sampling
from launch.generation.stop import NewText, StopStrings, Stream, cut

#: Positions of all rows together that one batch may take: more sequences follow one another, so that the cache stays in memory.
BATCH_POSITIONS = 65_536


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
