"""The command line of `launch/plan.py`."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from data.cli import UserError
from data.flags import Parser, as_dataclass, at_least_one
from launch.engine.strategy import CHECKPOINTING_MODES
from model.config_json import PRESETS
from model.sizes import USUAL_CONTEXT

EXAMPLES = """
  python launch/plan.py --model 800m --gpu a100-80gb --num_gpus 8 --deepspeed_config ds_configs/ep8_zero2.json --tokens 131e9
  python launch/plan.py --model 4b --gpu h100-80gb --num_gpus 8 --num_nodes 4 --tokens 1e12 --price 2.50 --curve
  python launch/plan.py --model 4b --gpu rtx-4090 --num_gpus 8 --write fits.json
  python launch/plan.py --from runs/first --price 1.80
"""
#: Several times the largest clusters; the search for layouts takes longer with each GPU.
MAX_GPUS = 1 << 20
#: What `--from` cannot obey.
OF_A_NEW_RUN = (
    *("model", "deepspeed_config", "sequence_length", "activation_checkpointing", "num_gpus", "num_nodes", "ladder"),
    *("curve", "write"),
)


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Raises `UserError` that names the flag."""

    model: str
    gpu: str | None
    num_gpus: int
    num_nodes: int
    deepspeed_config: Path | None
    sequence_length: int | None
    activation_checkpointing: str | None
    tokens: float | None
    price: float | None
    ladder: Path | None
    from_run: Path | None
    json: bool
    write: Path | None
    curve: bool

    def __post_init__(self) -> None:
        at_least_one(self, "num_gpus", "num_nodes", "sequence_length")
        if self.tokens is not None and not (math.isfinite(self.tokens) and self.tokens >= 1):
            raise UserError(f"--tokens must be at least 1, such as 131e9, not {self.tokens}")
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise UserError(f"--price must be 0 or more (for one GPU and hour), not {self.price}")
        if self.gpu is None and self.from_run is None:
            raise UserError("--gpu is missing, such as --gpu a100-80gb; --help lists the flags")
        if self.price is not None and self.tokens is None and self.from_run is None:
            raise UserError("--price needs --tokens, such as --tokens 131e9: the cost depends on how much is trained")
        if self.ladder is not None and self.tokens is None:
            raise UserError("--ladder needs --tokens, such as --tokens 131e9: bits per byte depend on how much is read")
        if self.ranks > MAX_GPUS:
            raise UserError(f"--num_gpus times --num_nodes must be at most {MAX_GPUS:,}, not {self.ranks:,}")

    @property
    def ranks(self) -> int:
        return self.num_gpus * self.num_nodes


def _tokens(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number such as 14.5e9") from None


def build_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python launch/plan.py",
        description="Memory, time and cost of a training run before it is paid for. Needs no GPU and no data.",
        examples=EXAMPLES,
        usage="python launch/plan.py --gpu GPU [options]",
    )
    what = p.add_argument_group("what to train")
    what.add_argument("--model", default="800m", help=f"a preset ({', '.join(PRESETS)}), a config.json or a folder with one")
    what.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="JSON",
        help="a DeepSpeed JSON, such as those in ds_configs/ (default: by the number of GPUs)",
    )
    what.add_argument(
        "--sequence_length",
        type=int,
        metavar="N",
        help=f"tokens in a sample (default: {USUAL_CONTEXT}, or the model's context if that is shorter)",
    )
    what.add_argument(
        "--activation_checkpointing", choices=CHECKPOINTING_MODES, help="overrides the JSON's activation_checkpointing.mode"
    )
    what.add_argument("--from", dest="from_run", type=Path, metavar="RUN", help="plan the rest of a run from its measured speed")
    where = p.add_argument_group("on which GPUs")
    where.add_argument("--gpu", help="a GPU such as a100-80gb, h100-80gb, h200; an unknown name lists all")
    where.add_argument("--num_gpus", type=int, default=8, metavar="N", help="GPUs in a node")
    where.add_argument("--num_nodes", type=int, default=1, metavar="N", help="number of nodes")
    how_much = p.add_argument_group("for how long")
    how_much.add_argument(
        "--tokens", type=_tokens, metavar="T", help="number of training tokens, such as 131e9; adds days and energy"
    )
    how_much.add_argument("--price", type=float, metavar="P", help="price of a GPU hour in your currency; adds the cost")
    how_much.add_argument(
        "--ladder", type=Path, metavar="JSON", help="output of benchmark.py ladder; adds the bits per byte to expect"
    )
    out = p.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print everything as one JSON object")
    out.add_argument("--curve", action="store_true", help="also show 1 to 512 GPUs, and what limits each")
    out.add_argument("--write", type=Path, metavar="JSON", help="write the fastest layout that fits as a DeepSpeed JSON")
    return p


def parse_arguments(argv: list[str] | None = None) -> PlanArguments:
    """Raises `UserError` with the flag's name."""
    parser = build_parser()
    found = parser.parse_args(argv)
    if found.from_run:
        for name in OF_A_NEW_RUN:
            if getattr(found, name) != parser.get_default(name):
                raise UserError(f"--{name} does not go with --from, which plans the rest of a run as its config.json has it")
    return as_dataclass(PlanArguments, found)
