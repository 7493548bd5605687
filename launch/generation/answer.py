"""Prompts to answers on standard output: one as it comes, several when all are there, or one after another at a terminal."""

from __future__ import annotations

import json

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data.terminal import say, stdout, write_out
from launch.generation import interactive
from launch.generation.prompts import Prompt, prompt_ids
from launch.generation.sampler import Completion, complete
from launch.generation.sampling import Sampling
from launch.generation.stop import Stream


def converse(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, *, suffix: str | None, as_json: bool
) -> None:
    with interactive.line_editor(interactive.history_file()):
        interactive.converse(
            lambda text: answer(model, tokenizer, [Prompt(text=text, suffix=suffix, typed=True)], sampling, as_json=as_json)
        )


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], sampling: Sampling, *, as_json: bool
) -> None:
    """Complete the prompts and write the answers: one as it comes, several when all are there."""
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    alone = len(prompts) == 1 and sampling.num_return_sequences == 1 and not as_json
    stream = Stream(tokenizer, sampling.stop, lambda text: write_out(text, end="")) if alone else None
    if alone:
        write_out(prompts[0].text, end="")
    completions, seconds = complete(model, tokenizer, ids, sampling, stream)
    count = sum(one.tokens for one in completions)
    if alone:
        write_out(prompts[0].suffix or "")
    else:
        for number, one in enumerate(completions):
            write_out(as_line(one, prompts[one.prompt], sampling) if as_json else titled(number, one, prompts[one.prompt]))
    say(f"{count:,} tokens, {count / seconds:,.1f} a second")


def as_line(one: Completion, prompt: Prompt, sampling: Sampling) -> str:
    said = {"prompt": prompt.text, "completion": one.text, "finish_reason": one.finish, "tokens": one.tokens, "seed": sampling.seed}
    if prompt.suffix is not None:
        said["suffix"] = prompt.suffix
    return json.dumps(said, ensure_ascii=not stdout.encoding.lower().startswith("utf"))  # its escapes, not Python's


def titled(number: int, one: Completion, prompt: Prompt) -> str:
    return f"--- {number + 1}, of prompt {one.prompt + 1}, ended by {one.finish}\n{prompt.text}{one.text}{prompt.suffix or ''}"
