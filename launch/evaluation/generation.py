"""Completions of prompts by a model, many at a time: left-padded batches that end at stop strings.

Shapes: B prompts, S tokens of the longest of them, N new tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from data.cli import Progress, UserError
from launch.evaluation.problems import Problem
from launch.evaluation.samples import SampleFile
from launch.generation.decode import fast
from launch.generation.prompts import FIM, Prompt, prompt_ids
from launch.generation.sampler import SEEDS, TEMPERATURES, end_ids, left_padded, may_be_seed, may_be_temperature
from launch.generation.stop import cut

#: Tokens at the end in which a new stop string is looked for; the longest has eight characters, which are at most eight tokens.
TAIL_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0: always the likeliest token."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not may_be_temperature(self.temperature):
            raise UserError(f"--temperature must be {TEMPERATURES}, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        if not may_be_seed(self.seed):
            raise UserError(f"--seed must be {SEEDS}, not {self.seed}")
        if self.temperature == 0 and self.samples > 1:
            raise UserError(
                f"--temperature 0 makes {self.samples} equal samples of a problem; ask for one, or a temperature above 0"
            )

    def options(self) -> dict[str, Any]:
        """For transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class AtStops(StoppingCriteria):
    """True for rows whose new text has a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[tuple[str, ...]], width: int) -> None:
        self.tokenizer, self.stops, self.width = tokenizer, stops, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = input_ids[:, max(self.width, input_ids.shape[1] - TAIL_TOKENS) :].tolist()
        texts = [self.tokenizer.decode(tail, clean_up_tokenization_spaces=False) for tail in tails]
        found = [any(stop in text for stop in stops) for text, stops in zip(texts, self.stops, strict=True)]
        return torch.tensor(found, device=input_ids.device)


def prompt_of(problem: Problem) -> Prompt:
    return Prompt(text=problem.prompt, suffix=problem.suffix if problem.infill else None)


def check_infilling(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> None:
    lacking = [token for token in FIM if token not in tokenizer.get_vocab()]
    if lacking and any(problem.infill for problem in problems):
        raise UserError(f"--infilling needs a model that was trained to fill in; its tokenizer has no {lacking[0]}")


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], sampling: Sampling
) -> list[str]:
    """One completion of each problem's prompt, up to the first stop string. A prompt that fills the context gets an empty one."""
    prompts = [prompt_ids(prompt_of(problem), tokenizer) for problem in problems]
    width = max(len(prompt) for prompt in prompts)
    room = min(sampling.max_new_tokens, model.config.max_position_embeddings - width)
    if room < 1:
        if len(problems) == 1:
            return [""]
        return [text for problem in problems for text in complete(model, tokenizer, [problem], sampling)]
    ends = end_ids(model)
    pad = ends[0] if ends else 0
    ids_BS, mask_BS = left_padded(prompts, width, pad)
    stops = [problem.stops for problem in problems]
    generate: Any = model.generate  # typed as if it were a tensor
    out = generate(
        ids_BS.to(model.device),
        attention_mask=mask_BS.to(model.device),
        max_new_tokens=room,
        eos_token_id=ends or None,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([AtStops(tokenizer, stops, width)]),
        **fast(model),
        **sampling.options(),
    )
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [cut(text, problem.stops)[0] + problem.ending for text, problem in zip(texts, problems, strict=True)]


def generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], sampling: Sampling, file: SampleFile
) -> None:
    """Fills the file up. Every batch has a seed of its own, so that one that is resumed makes what an uninterrupted one would."""
    check_infilling(tokenizer, problems)
    wanted = [problem for problem in problems for _ in range(sampling.samples)]
    with contextlib.closing(file):
        done = file.begin(sampling.batch_size)
        progress = Progress(len(wanted), what="sampling", unit="samples", done=done)
        for first, batch in batches(wanted, done, sampling.batch_size):
            torch.manual_seed(sampling.seed + first)
            completions = complete(model, tokenizer, batch, sampling)
            file.append([(problem.task_id, text) for problem, text in zip(batch, completions, strict=True)])
            progress.update(first + len(batch))
        progress.close()


def batches(wanted: Sequence[Problem], done: int, size: int) -> Iterator[tuple[int, Sequence[Problem]]]:
    for first in range(done, len(wanted), size):
        yield first, wanted[first : first + size]
