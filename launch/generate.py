"""Continue prompts with an exported model, or fill in the middle of one.

python launch/generate.py --model hf/ --prompt 'def fibonacci(n):'
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import fields
from pathlib import Path

if __name__ == "__main__" and not __package__:  # or what is installed, or on PYTHONPATH, would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import NotFound, UserError
from data.flags import Parser
from data.terminal import say
from launch.cli import check_rope_factor, make_quiet, run_command
from launch.generation.sampling import Sampling
from model.config_json import ATTENTION_IMPLEMENTATIONS

DRAWN = [field.name for field in fields(Sampling) if field.name != "stop"]  # each by a flag of its name
EXAMPLES = r"""
python launch/generate.py --model hf/ --prompt 'def fibonacci(n):'
python launch/generate.py --model hf/ --prompt - --max_new_tokens 256 --temperature 0 < half_a_file.py
python launch/generate.py --model hf/ --prompt 'def area(r):' --suffix '    return a' --stop '\n\n'
python launch/generate.py --model hf/ --prompt 'import ' --prompt 'class ' --num_return_sequences 4 --temperature 0.8 --json
"""


def build_parser() -> argparse.ArgumentParser:
    about = "Continue prompts with an exported model. At a terminal and without a prompt, it asks for prompts one by one."
    p = Parser(prog="python launch/generate.py", description=about, examples=EXAMPLES)
    p.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a folder that launch/export.py wrote, or a stock Glm4Moe"
    )
    what = p.add_argument_group("what to write")
    text = "text to continue, which may contain special tokens; - reads standard input; repeat for a batch"
    what.add_argument("--prompt", action="append", metavar="TEXT", help=text)
    text = "file whose text to continue; special tokens are plain text here, in - and with --suffix"
    what.add_argument("--prompt_file", action="append", type=Path, metavar="FILE", help=text)
    what.add_argument(
        "--suffix", metavar="TEXT", help="fill in between each prompt and this text; only for models trained with --fim_rate"
    )
    what.add_argument("--num_return_sequences", type=int, metavar="N", help="continuations per prompt")
    what.add_argument("--max_new_tokens", type=int, metavar="N", help="most tokens to add")
    what.add_argument("--stop", action="append", metavar="TEXT", help=r"stop before this text (\n is a line end); may be repeated")
    how = p.add_argument_group("how to choose tokens")
    how.add_argument("--temperature", type=float, metavar="T", help="0: always take the likeliest token")
    how.add_argument("--top_p", type=float, metavar="P", help="draw only from the likeliest tokens with this total probability")
    how.add_argument("--top_k", type=int, metavar="K", help="draw only from this many likeliest tokens; 0: no limit")
    how.add_argument("--min_p", type=float, metavar="P", help="drop tokens below this share of the likeliest one's probability")
    how.add_argument("--repetition_penalty", type=float, metavar="X", help="over 1: make tokens that were there less likely")
    how.add_argument("--seed", type=int, metavar="N", help="random seed of the draws")
    how.add_argument("--attn_implementation", choices=ATTENTION_IMPLEMENTATIONS, default="sdpa", help="attention implementation")
    how.add_argument(
        "--rope_factor", type=float, metavar="X", help="YaRN: extend the model to this many times its original context"
    )
    how.add_argument("--json", action="store_true", help="print one JSON object per continuation")
    p.set_defaults(**{name: getattr(Sampling, name) for name in DRAWN})
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
    from launch.exported.model import load_exported
    from launch.generation.answer import answer, converse
    from launch.generation.prompts import check_filling_in, read_prompts
    from launch.generation.stop import unescape
    from launch.toolchain import default_device

    stops = tuple(unescape(stop) for stop in arguments.stop or [] if stop)
    sampling = Sampling(stop=stops, **{name: getattr(arguments, name) for name in DRAWN})
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


if __name__ == "__main__":
    run_command(main)
