"""Continue prompts with an exported model, or fill in the middle of one.

python launch/generate.py --model hf/ --prompt 'def fibonacci(n):'
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and not __package__:  # or what is installed, or on PYTHONPATH, would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import NotFound, UserError
from data.flags import Parser
from data.terminal import say, stdout, write_out
from launch.cli import check_rope_factor, make_quiet, run_command
from model.sizes import ATTENTION_IMPLEMENTATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from launch.generation.prompts import Prompt
    from launch.generation.sampler import Completion, Sampling

EXAMPLES = r"""
python launch/generate.py --model hf/ --prompt 'def fibonacci(n):'
python launch/generate.py --model hf/ --prompt - --max_new_tokens 256 --temperature 0 < half_a_file.py
python launch/generate.py --model hf/ --prompt 'def area(r):' --suffix '    return a' --stop '\n\n'
python launch/generate.py --model hf/ --prompt 'import ' --prompt 'class ' --num_return_sequences 4 --temperature 0.8 --json
"""


def build_parser() -> argparse.ArgumentParser:
    about = "Continue prompts with an exported model. Without a prompt, at a terminal, it asks for one after another."
    p = Parser(prog="python launch/generate.py", description=about, examples=EXAMPLES)
    p.add_argument("--model", type=Path, required=True, metavar="DIR", help="a folder of launch/export.py, or a stock Glm4Moe")
    what = p.add_argument_group("what")
    text = "text to continue, special tokens too; - is standard input; repeated: a batch"
    what.add_argument("--prompt", action="append", metavar="TEXT", help=text)
    text = "a file's text to continue; here, in - and with --suffix special tokens are text"
    what.add_argument("--prompt_file", action="append", type=Path, metavar="FILE", help=text)
    what.add_argument("--suffix", metavar="TEXT", help="fill in between each prompt and this; for models trained to")
    what.add_argument("--num_return_sequences", type=int, default=1, metavar="N", help="continuations of each prompt")
    what.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="tokens to add at most")
    what.add_argument("--stop", action="append", metavar="TEXT", help=r"end before this text (\n is a line's end); may be repeated")
    how = p.add_argument_group("how")
    how.add_argument("--temperature", type=float, default=0.2, metavar="T", help="0: always the likeliest token")
    how.add_argument("--top_p", type=float, default=0.95, metavar="P", help="draw from the likeliest of this much probability")
    how.add_argument("--top_k", type=int, default=0, metavar="K", help="draw from this many likeliest tokens; 0: no limit")
    how.add_argument("--min_p", type=float, default=0.0, metavar="P", help="leave out tokens below this share of the likeliest's")
    how.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X", help="above 1: against tokens that were there")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws")
    how.add_argument("--attn_implementation", choices=ATTENTION_IMPLEMENTATIONS, default="sdpa", help="attention")
    how.add_argument("--rope_factor", type=float, metavar="X", help="YaRN: this many times the context it was trained at")
    how.add_argument("--json", action="store_true", help="one JSON object a continuation, on standard output")
    return p


def check(arguments: argparse.Namespace) -> None:
    """What is wrong whatever the model says: before the libraries are loaded, which takes seconds."""
    if not (arguments.model / "config.json").is_file():
        raise NotFound(f"--model {arguments.model} has no config.json; name a folder that launch/export.py wrote")
    at_terminal = sys.stdin is not None and sys.stdin.isatty()  # None: closed when the process started
    if not (arguments.prompt or arguments.prompt_file or at_terminal):
        raise UserError("give --prompt or --prompt_file; without either it asks at a terminal, and standard input is none")
    if (arguments.prompt or []).count("-") > 1:
        raise UserError("--prompt - reads standard input, which can be done once")
    check_rope_factor(arguments.rope_factor)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check(arguments)
    make_quiet()
    from launch.exported import load_exported
    from launch.generation.prompts import check_filling_in, read_prompts
    from launch.generation.sampler import Sampling
    from launch.generation.stop import unescape
    from launch.toolchain import default_device

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_return_sequences", "seed")
    stops = tuple(unescape(stop) for stop in arguments.stop or [] if stop)
    sampling = Sampling(stop=stops, **{name: getattr(arguments, name) for name in names})
    prompts = read_prompts(arguments.prompt or [], arguments.prompt_file or [], arguments.suffix)
    model, tokenizer = load_exported(
        arguments.model,
        device=default_device(),
        attn_implementation=arguments.attn_implementation,
        rope_factor=arguments.rope_factor,
    )
    if arguments.suffix is not None and (warning := check_filling_in(arguments.model, tokenizer)):
        say(warning)
    with contextlib.suppress(BrokenPipeError):  # nobody reads any more: `generate.py ... | head`
        if prompts:
            answer(model, tokenizer, prompts, sampling, as_json=arguments.json)
        else:
            converse(model, tokenizer, sampling, suffix=arguments.suffix, as_json=arguments.json)
    return 0


def converse(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, *, suffix: str | None, as_json: bool
) -> None:
    from launch.generation import interactive
    from launch.generation.prompts import Prompt

    with interactive.line_editor(interactive.history_file()):
        interactive.converse(
            lambda text: answer(model, tokenizer, [Prompt(text=text, suffix=suffix, typed=True)], sampling, as_json=as_json)
        )


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], sampling: Sampling, *, as_json: bool
) -> None:
    """Complete the prompts and write the answers: one as it comes, several when all are there."""
    from launch.generation.prompts import prompt_ids
    from launch.generation.sampler import complete
    from launch.generation.stop import Stream

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


if __name__ == "__main__":
    run_command(main)
