"""Train a MoE GPT on preprocessed shards.

deepspeed --num_gpus 8 launch/train.py --data shards/ --output runs/first

The cheap checks come first, so that a user's mistake shows within seconds on every rank; then the ranks join, agree on what
to resume from, build the engine and train. Exit codes: 0 finished or stopped cleanly, 2 a mistake in the input, 17 a hang.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import deepspeed_config, distributed
from launch.arguments import TrainArguments, parse_arguments
from launch.errors import USER_ERRORS, make_quiet, run_command
from launch.stop import StopRequest

if TYPE_CHECKING:  # `main` takes over the signals first; these import torch and transformers for seconds
    from data.dataset import PackedDataset
    from model import MoEGPTConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be trained, checked as far as one rank can by itself."""

    model: MoEGPTConfig
    train_data: PackedDataset
    validation_data: PackedDataset | None
    deepspeed: dict[str, Any]
    world_size: int
    gpus: int


def open_data(arguments: TrainArguments) -> tuple[PackedDataset, PackedDataset | None]:
    """The training split, and the validation split where there is one to evaluate on."""
    from data.dataset import PackedDataset

    sources = [parse_source(text) for text in arguments.data]
    options = {"sequence_length": arguments.sequence_length, "document_mask": arguments.document_mask}
    train = PackedDataset(sources, split="train", seed=arguments.seed, **options)
    if not arguments.eval_interval:
        return train, None
    try:
        return train, PackedDataset(sources, split="validation", **options)
    except ValueError as error:
        raise ValueError(f"{error}; or --eval_interval 0 to train without evaluation") from None


def parse_source(text: str) -> str | tuple[str, float]:
    """`DIR` or `DIR:WEIGHT`."""
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text
    try:
        return folder, float(weight)
    except ValueError:
        raise ValueError(f"--data {text}: the weight after the colon must be a number, not {weight!r}") from None


def plan(arguments: TrainArguments, world_size: int) -> Plan:
    """Read and check everything that needs no other rank. Errors: one sentence each."""
    import torch

    from launch.engine import load_model_config

    gpus = torch.cuda.device_count()
    train, validation = open_data(arguments)
    config = load_model_config(arguments.model)
    if config.vocab_size != train.vocab_size:
        raise ValueError(
            f"--data {arguments.data[0]} was made with a tokenizer of {train.vocab_size} tokens and the model {arguments.model} "
            f"has a vocabulary of {config.vocab_size}; preprocess with the model's tokenizer, or copy the model's config.json "
            f'with "vocab_size": {train.vocab_size}'
        )
    config.eos_token_id = train.eos_token_id
    if arguments.rope_factor:
        config = config.with_rope_factor(arguments.rope_factor)
    if arguments.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"--sequence_length {arguments.sequence_length} is beyond the {config.max_position_embeddings} positions of "
            f"{arguments.model}; --rope_factor extends them"
        )
    path = arguments.deepspeed_config or deepspeed_config.default_path(gpus, world_size)
    resolved = deepspeed_config.resolve_config(
        deepspeed_config.read_config(path),
        path,
        world_size=world_size,
        num_experts=config.n_routed_experts,
        max_steps=arguments.max_steps,
    )
    return Plan(
        model=config,
        train_data=train,
        validation_data=validation,
        deepspeed=resolved,
        world_size=world_size,
        gpus=gpus,
    )


def main() -> int:
    stop = StopRequest().install()
    make_quiet()
    # The tokens of an expert vary from step to step, and with them the sizes of its activations: growing segments do not fragment.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    _, world_size = distributed.set_environment()
    try:
        arguments = parse_arguments()
        stop.after(arguments.max_hours)
        planned = plan(arguments, world_size)
    except USER_ERRORS as error:
        if world_size == 1:
            raise
        from launch.session import refuse_together

        refuse_together(error)
    from launch.session import run_session

    return run_session(arguments, planned, stop)


if __name__ == "__main__":
    run_command(main)
