"""The command line of `launch/train.py`: model, data, run length, cadence and output; the DeepSpeed JSON owns the rest."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn


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
    save_interval: int
    keep_last: int
    keep_every: int
    async_save: bool
    resume: str
    init_from: Path | None
    seed: int
    patience: int
    wandb: str
    wandb_project: str
    attn_implementation: str
    activation_checkpointing: str | None
    document_mask: bool
    rope_factor: float | None
    spike_sigma: float
    spike_window: int
    spike_rollback: int
    max_hours: float
    stall_timeout: float
    verify: bool
    stop_after: int

    def __post_init__(self) -> None:
        for name in ("max_steps", "sequence_length", "log_interval", "eval_batches", "save_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("eval_interval", "keep_last", "keep_every", "patience", "spike_window", "spike_rollback"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be 0 (off) or more, not {getattr(self, name)}")
        if self.patience and not self.eval_interval:
            raise ValueError("--patience counts evaluations, and --eval_interval 0 makes none; set --eval_interval")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output {self.output} is a file; name a folder")

    def as_json(self) -> dict[str, Any]:
        """For config.json."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


class Parser(argparse.ArgumentParser):
    """A wrong flag is a user's mistake like any other: one sentence for all ranks, not a usage text from each."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")


def build_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="deepspeed --num_gpus N launch/train.py",
        description="Train a MoE GPT on preprocessed shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    what = p.add_argument_group("what to train on what")
    what.add_argument("--data", nargs="+", required=True, metavar="DIR[:WEIGHT]", help="folders of data/preprocess.py")
    what.add_argument("--output", type=Path, required=True, help="the run's folder")
    what.add_argument("--model", default="800m", help="a preset (tiny, 60m, 800m, 4b) or a config.json")
    what.add_argument("--sequence_length", type=int, default=2048, help="tokens of one sample")
    what.add_argument("--document_mask", action="store_true", help="attention and positions stay inside a document")
    what.add_argument("--rope_factor", type=float, help="YaRN: take a trained model to this many times its context")
    what.add_argument("--init_from", type=Path, help="start from the weights of an exported folder, at step 0")
    how = p.add_argument_group("how")
    how.add_argument("--deepspeed_config", type=Path, help="a file of ds_configs/; default by the number of GPUs")
    how.add_argument("--attn_implementation", default="flash", choices=("flash", "sdpa", "eager"))
    how.add_argument(
        "--activation_checkpointing",
        choices=("none", "selective", "full"),
        help="overrides the JSON's activation_checkpointing.mode",
    )
    how.add_argument("--seed", type=int, default=1234)
    how.add_argument("--spike_sigma", type=float, default=6.0, help="skip a step this far above the mean; 0: off")
    how.add_argument("--spike_window", type=int, default=128, help="steps that mean and deviation are taken over")
    how.add_argument("--spike_rollback", type=int, default=5, help="skipped steps in a row that roll back; 0: never")
    when = p.add_argument_group("how long and how often (in optimizer steps)")
    when.add_argument("--max_steps", type=int, default=100_000)
    when.add_argument("--stop_after", type=int, default=0, help="stop cleanly at this step, the schedule unchanged")
    when.add_argument("--max_hours", type=float, default=0.0, help="save and stop cleanly after this time; 0: never")
    when.add_argument("--log_interval", type=int, default=10)
    when.add_argument("--eval_interval", type=int, default=1000, help="0: never")
    when.add_argument("--eval_batches", type=int, default=64, help="global micro-batches of one evaluation")
    when.add_argument("--patience", type=int, default=0, help="stop after this many evaluations without a new best")
    out = p.add_argument_group("checkpoints and logs")
    out.add_argument("--save_interval", type=int, default=50_000)
    out.add_argument("--keep_last", type=int, default=3, help="checkpoints to keep; 0: all")
    out.add_argument("--keep_every", type=int, default=0, help="also keep every checkpoint at a multiple of this step")
    out.add_argument(
        "--async_save",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="training goes on while a checkpoint, copied to host memory, is written",
    )
    out.add_argument("--resume", default="auto", metavar="auto|never|PATH")
    out.add_argument("--verify", action="store_true", help="check the shards' checksums before training")
    out.add_argument("--wandb", default="offline", choices=("online", "offline", "disabled"))
    out.add_argument("--wandb_project", default="moe-code-gpt")
    out.add_argument("--stall_timeout", type=float, default=1800.0, help="seconds without a step before all ranks end")
    p.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it
    return p


def parse_arguments(argv: list[str] | None = None) -> TrainArguments:
    """Parse and validate. Errors: `ValueError` with the flag's name."""
    values = vars(build_parser().parse_args(argv))
    values["data"] = tuple(values["data"])
    known = {f.name for f in fields(TrainArguments)}
    return TrainArguments(**{k: v for k, v in values.items() if k in known})
