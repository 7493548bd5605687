"""Completions of prompts by a model, many at a time: left-padded batches that end at stop strings."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data.cli import UserError
from data.terminal import Progress
from launch.evaluation.problems import Problem
from launch.evaluation.samples import SampleFile
from launch.generation.prompts import Prompt, lacking_fim, prompt_ids
from launch.generation.sampler import end_ids, finished, new_tokens
from launch.generation.sampling import Sampling
from launch.generation.stop import NewText


def prompt_of(problem: Problem) -> Prompt:
    return Prompt(text=problem.prompt, suffix=problem.suffix if problem.infill else None)


def check_infilling(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> None:
    lacking = lacking_fim(tokenizer)
    if lacking and any(problem.infill for problem in problems):
        raise UserError(f"--infilling needs a model that was trained to fill in; its tokenizer has no {lacking[0]}")


def short_of_context(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], sampling: Sampling
) -> list[str]:
    """The problems whose prompts leave fewer than `max_new_tokens` of the model's positions."""
    most = model.config.max_position_embeddings - sampling.max_new_tokens
    return [problem.task_id for problem in problems if len(prompt_ids(prompt_of(problem), tokenizer)) > most]


def seed_of(seed: int, first: int) -> int:
    """Of the batch that begins with sample `first`. No sum: other seeds would have the same batches elsewhere."""
    return int.from_bytes(hashlib.sha256(f"{seed} {first}".encode()).digest()[:8], "little")


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], sampling: Sampling
) -> list[str]:
    """One completion of each problem's prompt, up to the first stop string. A prompt that fills the context gets an empty one.

    Where the longest prompt leaves too little room, each goes by itself: a neighbour does not shorten the others' completions.
    """
    prompts = [prompt_ids(prompt_of(problem), tokenizer) for problem in problems]
    width = max(len(prompt) for prompt in prompts)
    room = min(sampling.max_new_tokens, model.config.max_position_embeddings - width)
    if room < sampling.max_new_tokens and len(problems) > 1:
        return [text for problem in problems for text in complete(model, tokenizer, [problem], sampling)]
    if room < 1:
        return [""]
    rows = new_tokens(model, tokenizer, prompts, replace(sampling, max_new_tokens=room), [problem.stops for problem in problems])
    new_text, ends = NewText(tokenizer), end_ids(model)
    return [
        finished(new_text, row, number, ends, problem.stops, last=prompts[number][-1]).text + problem.ending
        for number, (row, problem) in enumerate(zip(rows, problems, strict=True))
    ]


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    sampling: Sampling,
    file: SampleFile,
    *,
    samples: int,
    batch_size: int,
) -> None:
    """Fills the file up to `samples` of each problem. Every batch has a seed of its own, so that one that is resumed makes what an
    uninterrupted one would."""
    wanted = [problem for problem in problems for _ in range(samples)]
    with contextlib.closing(file):
        done = file.begin(batch_size)
        progress = Progress(len(wanted), what="sampling", unit="samples", done=done)
        for first in range(done, len(wanted), batch_size):
            batch = wanted[first : first + batch_size]
            torch.manual_seed(seed_of(sampling.seed, first))
            completions = complete(model, tokenizer, batch, sampling)
            file.append([(problem.task_id, text) for problem, text in zip(batch, completions, strict=True)])
            progress.update(first + len(batch))
        progress.close()
