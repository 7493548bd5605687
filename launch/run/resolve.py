"""From the command line to what is to be trained: everything that one rank can read and check by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from data.cli import UserError
from data.dataset import PackedDataset
from launch.engine import strategy
from launch.engine.keys import check_keys
from launch.engine.refused import check_compile
from launch.engine.strategy import Strategy
from launch.evaluation.problems import ProblemFile
from launch.model_config import extended, load_model_config
from launch.run.arguments import TrainArguments, parse_source
from launch.toolchain import trains_on_gpu
from model import MoEGPTConfig
from model.config_json import find_model


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """What is to be trained, every default and `"auto"` filled in."""

    model: MoEGPTConfig
    train_data: PackedDataset
    validation_data: PackedDataset | None
    task_data: dict[str, PackedDataset]
    task_files: dict[str, ProblemFile]
    deepspeed: dict[str, Any]
    world_size: int

    @cached_property
    def strategy(self) -> Strategy:
        return Strategy.of(self.deepspeed)


def open_data(arguments: TrainArguments) -> tuple[PackedDataset, PackedDataset | None]:
    """The training split, and the validation split where there is one to evaluate on."""
    sources = [parse_source(text) for text in arguments.data]
    length, mask = arguments.sequence_length, arguments.document_mask
    train = PackedDataset(sources, split="train", seed=arguments.seed, sequence_length=length, document_mask=mask)
    if not arguments.eval_interval:
        return train, None
    try:
        return train, PackedDataset(sources, split="validation", sequence_length=length, document_mask=mask)
    except UserError as error:
        raise UserError(f"{error}; or --eval_interval 0 to train without evaluation") from None


def open_tasks(arguments: TrainArguments, train: PackedDataset) -> tuple[dict[str, PackedDataset], dict[str, ProblemFile]]:
    """The validation splits and the files of problems of `--eval_tasks`, by their names.

    Raises UserError for a name twice, another tokenizer, a file without problems or without leave to run what is written.
    """
    found: dict[str, PackedDataset] = {}
    files: dict[str, ProblemFile] = {}
    for text in arguments.eval_tasks:
        name, _, folder = text.partition("=")
        if not name.isidentifier() or not folder or name in found or name in files:
            raise UserError(f"--eval_tasks {text}: give NAME=PATH, each name once, of letters, digits and underscores")
        if Path(folder).is_file():
            if not arguments.allow_code_execution:
                raise UserError(f"--eval_tasks {text} runs code that the model wrote; if you want that, add --allow_code_execution")
            files[name] = ProblemFile.of(Path(folder))
            continue
        length, mask = arguments.sequence_length, arguments.document_mask
        found[name] = PackedDataset([folder], split="validation", sequence_length=length, document_mask=mask)
        if found[name].tokenizer_fingerprint != train.tokenizer_fingerprint:
            raise UserError(f"--eval_tasks {text}: these shards were made with another tokenizer than --data {arguments.data[0]}")
    return found, files


def resolve_run(arguments: TrainArguments, world_size: int) -> ResolvedRun:
    """Read and check everything that needs no other rank. Raises UserError with one sentence."""
    gpus = torch.cuda.device_count() if trains_on_gpu() else 0  # ranks on CPUs beside GPUs want a strategy for CPUs
    train, validation = open_data(arguments)
    config = fit_model(load_model_config(arguments.model), arguments, train)
    path = arguments.deepspeed_config or strategy.default_path(gpus, world_size, config.n_routed_experts)
    task_data, task_files = open_tasks(arguments, train)
    settings = strategy.read_config(path)
    return ResolvedRun(
        model=config,
        train_data=train,
        validation_data=validation,
        task_data=task_data,
        task_files=task_files,
        deepspeed=resolve_settings(settings, path, arguments, world_size=world_size, num_experts=config.n_routed_experts),
        world_size=world_size,
    )


def fit_model(config: MoEGPTConfig, arguments: TrainArguments, train: PackedDataset) -> MoEGPTConfig:
    """The model as it is trained on these data. Raises UserError for another vocabulary, or samples longer than its positions."""
    if config.vocab_size != train.vocab_size:
        mend = f"preprocess with the model's tokenizer, or copy the model's config.json with \"vocab_size\": {train.vocab_size}"
        if arguments.init_from:
            mend = f"to go on from {arguments.init_from} name its model, --model {arguments.init_from / 'config.json'}"
        raise UserError(
            f"--data {arguments.data[0]} was made with a tokenizer of {train.vocab_size} tokens and the model {arguments.model} "
            f"has a vocabulary of {config.vocab_size}; {mend}"
        )
    config.eos_token_id = train.eos_token_id
    if arguments.rope_factor:
        config = extended(config, arguments.rope_factor)
    if arguments.sequence_length > config.max_position_embeddings:
        mend = "--rope_factor extends them"
        if not arguments.init_from and not may_resume(arguments):  # random weights have no context to extend
            mend = (
                f'copy the model\'s config.json ({find_model(arguments.model)}) with "max_position_embeddings": '
                f"{arguments.sequence_length} and no rope_parameters; --rope_factor is for a trained model (--init_from)"
            )
        if arguments.rope_factor:
            first = (config.rope_parameters or {})["original_max_position_embeddings"]
            mend = f"--rope_factor {arguments.rope_factor:g} counts from the {first} it was first trained at; take a larger one"
        raise UserError(
            f"--sequence_length {arguments.sequence_length} is beyond the {config.max_position_embeddings} positions of "
            f"{arguments.model}; {mend}"
        )
    return config


def may_resume(arguments: TrainArguments) -> bool:
    """Whether the weights may come from a checkpoint; `choose` says later which."""
    return arguments.resume != "never" and (arguments.resume != "auto" or (arguments.output / "checkpoints").is_dir())


def resolve_settings(
    settings: dict[str, Any], path: Path, arguments: TrainArguments, *, world_size: int, num_experts: int
) -> dict[str, Any]:
    """The DeepSpeed JSON of `path` with every `"auto"` filled in. Raises UserError for what cannot be trained."""
    given = strategy.with_mode(settings, arguments.activation_checkpointing)
    resolved = strategy.resolve_config(given, path, world_size=world_size, num_experts=num_experts, max_steps=arguments.max_steps)
    if arguments.compile is not None:
        resolved["compile"] = {**resolved.get("compile", {}), "autoep_non_moe": arguments.compile}
    check_compile(resolved, path, documents=arguments.document_mask)
    check_keys(resolved, path)
    strategy.check_precision(resolved, path)
    device, chosen = get_accelerator(), Strategy.of(resolved)
    if chosen.dtype == "float16" and not device.is_fp16_supported():
        raise UserError(f"{path}: fp16.enabled: the {device.device_name().upper()} cannot train in fp16; use bf16.enabled")
    return resolved
