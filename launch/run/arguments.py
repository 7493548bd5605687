"""The command line of `launch/train.py`: model, data, run length, cadence and output; the DeepSpeed JSON owns the rest."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.cli import NotFound, UserError
from data.flags import Parser, as_dataclass, at_least_one, not_negative
from launch.cli import check_rope_factor
from launch.engine.strategy import CHECKPOINTING_MODES, read_config
from launch.run.spikes import LEAST_HISTORY
from model.config_json import ATTENTION_IMPLEMENTATIONS, PRESETS, find_model, load_sizes
from model.sizes import USUAL_CONTEXT

EXAMPLES = """
deepspeed --num_gpus 8 launch/train.py --data shards/ --output runs/first
deepspeed --num_gpus 8 launch/train.py --data shards/ --output runs/first --deepspeed_config ds_configs/ep8_zero3.json
deepspeed --num_gpus 2 launch/train.py --data code/:0.7 text/:0.3 --output runs/mix --model tiny --max_steps 2000
python launch/train.py --data shards --output runs/8k --init_from hf --model hf/config.json --rope_factor 4 --sequence_length 8192
"""


SEEDS = 1 << 63
PATTERN = re.compile(r"[\[\]*?]")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Everything that a run is started with. Validated in `__post_init__`; an error names the flag."""

    data: tuple[str, ...]
    output: Path
    model: str
    deepspeed_config: Path | None
    max_steps: int
    sequence_length: int
    log_interval: int
    eval_interval: int
    eval_batches: int
    eval_tasks: tuple[str, ...]
    eval_problems: int
    allow_code_execution: bool
    save_interval: int
    keep_last: int
    keep_every: int
    async_save: bool
    resume: str
    init_from: Path | None
    seed: int
    patience: int
    tracker: tuple[str, ...]
    tracker_detail: str
    health_interval: int
    wandb: str
    wandb_project: str
    attn_implementation: str
    activation_checkpointing: str | None
    compile: bool | None
    deterministic: bool
    document_mask: bool
    rope_factor: float | None
    spike_sigma: float
    spike_window: int
    spike_rollback: int
    max_hours: float
    stall_timeout: float
    verify: bool
    stop_after: int
    profile: int

    def __post_init__(self) -> None:
        at_least_one(self, "max_steps", "sequence_length", "log_interval", "eval_batches", "eval_problems", "save_interval")
        not_negative(self, "eval_interval", "patience", "spike_sigma", "spike_window", "spike_rollback", "stop_after", "max_hours")
        not_negative(self, "keep_last", "keep_every", "health_interval", "profile")
        check_rope_factor(self.rope_factor)
        if 0 < self.spike_window < LEAST_HISTORY:
            judged = f"at least {LEAST_HISTORY}, by which a step is judged"
            raise UserError(f"--spike_window must be 0 (off) or {judged}, not {self.spike_window}")
        if not 0 < self.stall_timeout < math.inf:
            raise UserError(f"--stall_timeout must be seconds above 0, such as 1800, not {self.stall_timeout}")
        if not -SEEDS <= self.seed < SEEDS:
            raise UserError(f"--seed must be a whole number of 64 bits, such as 1234, not {self.seed}")
        if self.eval_tasks and not self.eval_interval:
            raise UserError("--eval_tasks are measured at evaluations, and --eval_interval 0 makes none; set --eval_interval")
        if self.patience and not self.eval_interval:
            raise UserError("--patience counts evaluations, and --eval_interval 0 makes none; set --eval_interval")
        if "none" in self.tracker and len(set(self.tracker)) > 1:
            raise UserError(f"--tracker {' '.join(self.tracker)}: none stands alone; leave it out, or leave out the others")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output} is a file; name a folder")
        if pattern := PATTERN.search(str(self.output.absolute())):
            raise UserError(
                f"--output {self.output}: DeepSpeed takes {pattern[0]!r} in a path for a pattern and could not load "
                "what it saves there; name another folder"
            )

    def as_json(self) -> dict[str, Any]:
        """For config.json."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def build_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="deepspeed --num_gpus N launch/train.py",
        description="Train a MoE GPT on preprocessed shards.",
        examples=EXAMPLES,
    )
    _add_what(p.add_argument_group("what to train, on which data"))
    _add_how(p.add_argument_group("how to train"))
    _add_when(p.add_argument_group("how long and how often (in optimizer steps)"))
    _add_output(p.add_argument_group("checkpoints and logs"))
    p.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it
    return p


def _add_what(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--data", nargs="+", required=True, metavar="DIR[:WEIGHT]", help="folders that data/preprocess.py wrote")
    p.add_argument(
        "--output", type=Path, required=True, metavar="RUN", help="the run's folder; the same command resumes the run in it"
    )
    p.add_argument("--model", default="800m", help=f"a preset ({', '.join(PRESETS)}), a config.json or a folder with one")
    p.add_argument(
        "--sequence_length",
        type=int,
        metavar="N",
        help=f"tokens in a sample (default: {USUAL_CONTEXT}, or the model's context if that is shorter)",
    )
    p.add_argument("--document_mask", action="store_true", help="limit attention and positions to one document")
    p.add_argument(
        "--rope_factor", type=float, metavar="X", help="YaRN: extend a trained model to this many times its original context"
    )
    p.add_argument(
        "--init_from",
        type=Path,
        metavar="DIR",
        help="start at step 0 from an exported folder's weights; also pass --model DIR/config.json",
    )


def _add_how(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="JSON",
        help="a DeepSpeed JSON, such as those in ds_configs/; default: by the number of GPUs",
    )
    p.add_argument("--attn_implementation", default="flash", choices=ATTENTION_IMPLEMENTATIONS, help="attention implementation")
    p.add_argument(
        "--activation_checkpointing",
        choices=CHECKPOINTING_MODES,
        help="overrides the JSON's activation_checkpointing.mode",
    )
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile for each block's attention and norms; default: the JSON's compile.autoep_non_moe",
    )
    p.add_argument("--deterministic", action="store_true", help="make runs on GPUs bit-for-bit repeatable; slower")
    p.add_argument("--seed", type=int, default=1234, metavar="N", help="random seed of weights, data order and dropout")
    p.add_argument(
        "--spike_sigma",
        type=float,
        default=6.0,
        metavar="X",
        help="skip a step whose loss or gradient norm is this many deviations over the mean; 0: off",
    )
    p.add_argument("--spike_window", type=int, default=128, metavar="N", help="number of recent steps that give mean and deviation")
    p.add_argument(
        "--spike_rollback",
        type=int,
        default=5,
        metavar="N",
        help="roll back to a checkpoint after this many skipped steps in a row; 0: never",
    )


def _add_when(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--max_steps", type=int, default=100_000, metavar="N", help="length of the run and of its learning-rate schedule"
    )
    p.add_argument(
        "--stop_after", type=int, default=0, metavar="N", help="stop at this step without changing the schedule; 0: never"
    )
    p.add_argument("--max_hours", type=float, default=0.0, metavar="H", help="save and stop after this many hours; 0: never")
    p.add_argument("--log_interval", type=int, default=10, metavar="N", help="steps between rows in metrics.jsonl")
    p.add_argument("--eval_interval", type=int, default=1000, metavar="N", help="steps between evaluations; 0: never")
    p.add_argument("--eval_batches", type=int, default=64, metavar="N", help="global batches in an evaluation")
    p.add_argument(
        "--eval_tasks",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="also evaluate: a folder of shards gives bits per byte, a file such as HumanEval.jsonl.gz pass@1",
    )
    p.add_argument(
        "--eval_problems", type=int, default=20, metavar="N", help="how many problems of such a file to use, from its start"
    )
    p.add_argument(
        "--allow_code_execution",
        action="store_true",
        help="allow --eval_tasks to run generated code, in a sandbox on rank 0's host",
    )
    p.add_argument(
        "--patience", type=int, default=0, metavar="N", help="end the run after this many evaluations without a new best; 0: never"
    )


def _add_output(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--save_interval", type=int, default=50_000, metavar="N", help="steps between checkpoints")
    p.add_argument(
        "--keep_last",
        type=int,
        default=3,
        metavar="N",
        help="how many checkpoints to keep besides the best; new bests do not count; 0: all",
    )
    p.add_argument(
        "--keep_every", type=int, default=0, metavar="N", help="also keep checkpoints at multiples of this step; 0: none"
    )
    p.add_argument(
        "--async_save",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="copy checkpoints to host memory and write them while training continues",
    )
    p.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="the checkpoint to resume from")
    p.add_argument("--verify", action="store_true", help="check the checksums of the shards before training")
    p.add_argument(
        "--tracker",
        nargs="+",
        default=["wandb"],
        choices=("wandb", "tensorboard", "trackio", "none"),
        help="where to log besides metrics.jsonl (default: wandb)",
    )
    p.add_argument(
        "--tracker_detail", default="brief", choices=("brief", "detailed"), help="detailed: also log each layer's router"
    )
    p.add_argument("--health_interval", type=int, default=100, metavar="N", help="steps between maps of expert load; 0: never")
    p.add_argument("--wandb", default="offline", choices=("online", "offline", "disabled"), help="mode of Weights & Biases")
    p.add_argument("--wandb_project", default="moe-code-gpt", metavar="NAME", help="W&B project")
    p.add_argument(
        "--profile", type=int, default=0, metavar="N", help="trace N early steps and write where their time goes to RUN/profile/"
    )
    p.add_argument(
        "--stall_timeout", type=float, default=1800.0, metavar="S", help="end all ranks after this many seconds without progress"
    )


def parse_arguments(argv: list[str] | None = None) -> TrainArguments:
    """Parse and validate. Raises UserError with the flag's name."""
    found = build_parser().parse_args(argv)
    if found.sequence_length is None:
        found.sequence_length = USUAL_CONTEXT if found.rope_factor else _usual_context(found.model)
    found.tracker = list(dict.fromkeys(found.tracker))
    return as_dataclass(TrainArguments, found)


def _usual_context(model: str) -> int:
    """A model that cannot be read is refused later, in words of its own."""
    try:
        return load_sizes(model).usual_context
    except (ValueError, OSError):
        return USUAL_CONTEXT


def parse_source(text: str) -> str | tuple[str, float]:
    """`DIR` or `DIR:WEIGHT`, where no folder has the whole name. Raises UserError for a weight that is no number."""
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text
    if "://" in text:
        raise UserError(f"--data {text} is a URL; give a folder of shards on this machine, or a mounted one")
    try:
        return folder, float(weight)
    except ValueError:
        raise UserError(f"--data {text}: the weight after the colon must be a number, not {weight!r}") from None


def check_paths(arguments: TrainArguments) -> None:
    """What is plainly not there, before anything is imported that takes seconds. Raises UserError with the flag."""
    for text in arguments.data:
        source = parse_source(text)
        named = Path(source if isinstance(source, str) else source[0])
        if not named.exists():
            raise NotFound(f"--data {text}: no shards at {named}; make them with data/preprocess.py")
    try:
        find_model(arguments.model)
    except FileNotFoundError as error:
        raise NotFound(str(error)) from None
    if arguments.deepspeed_config is not None:
        read_config(arguments.deepspeed_config)
