"""What launch/evaluate.py does: the loss, then the samples, then their scores, in one JSON object."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from data.cli import UserError
from data.files import check_replaceable, replace_file
from launch.evaluation.arguments import samples_path, task_of
from launch.evaluation.problems import Problem, read_problems
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.scoring import available_cores, prepare_isolation, score


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result, which is written to --output as well. What can be refused is, before a model is loaded."""
    for path in filter(None, (arguments.output, arguments.samples_file)):
        check_replaceable(path)
    task = task_of(arguments)
    problems = read_problems(*task, most=arguments.problems) if task else {}
    limits = Limits(seconds=arguments.execution_timeout)
    isolation = prepare_isolation(arguments.isolation, limits, required=arguments.require_isolation) if task else None
    result: dict[str, Any] = {}
    samples_file = samples_path(arguments)
    if arguments.model and (arguments.data or not arguments.score):
        result |= with_model(arguments, task[0] if task else "", problems, samples_file)
    if task and isolation:
        workers = arguments.workers or available_cores()
        result = {
            **score(samples_file, problems, isolation=isolation, limits=limits, workers=workers),
            "task": task[0],
            **result,
        }
    if arguments.output:
        replace_file(arguments.output, (json.dumps(result, indent=2) + "\n").encode())
    return result


def with_model(arguments: argparse.Namespace, task: str, problems: dict[str, Problem], samples_file: Path) -> dict[str, Any]:
    """The loss where --data is given, and samples.jsonl where a task is and --score is not."""
    from launch.exported import default_device, load_exported

    model, tokenizer = load_exported(
        arguments.model,
        device=default_device(),
        attn_implementation=arguments.attn_implementation,
        rope_factor=arguments.rope_factor,
    )
    result: dict[str, Any] = {"model": str(arguments.model)}
    if arguments.data:
        result |= loss_of(arguments, model)
    if task and not arguments.score:
        result |= {"sampling": sample(arguments, task, problems, model, tokenizer, samples_file)}
    return result


def loss_of(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    from data.dataset import PackedDataset
    from launch.evaluation.loss import check_tokenizer, measure
    from model import MoEGPTForCausalLM

    if not isinstance(model, MoEGPTForCausalLM):
        kind = type(model).__name__
        raise UserError(f"--data measures the loss of launch/export.py's models, and {arguments.model} is a {kind}; leave it out")
    length = arguments.sequence_length or model.config.max_position_embeddings
    splits = []
    for folder in arguments.data:
        data = PackedDataset([folder], split="validation", sequence_length=length, document_mask=arguments.document_mask)
        check_tokenizer((arguments.model / "tokenizer.json").read_bytes(), data)
        splits.append((str(folder), data))
    if len(dict(splits)) < len(splits):
        raise UserError("--data names a folder twice")
    return measure(model, splits, batch_size=arguments.batch_size, batches=arguments.eval_batches)


def sample(
    arguments: argparse.Namespace, task: str, problems: dict[str, Problem], model: Any, tokenizer: Any, samples_file: Path
) -> dict[str, Any]:
    from launch.evaluation.generation import generate_samples
    from launch.evaluation.samples import SampleFile
    from launch.exported import weights_hash
    from launch.generation.sampler import Sampling

    drawn = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")}
    counts = {name: getattr(arguments, name) for name in ("samples", "batch_size")}
    settings = {
        "task": task,
        "model": str(arguments.model),
        "weights": weights_hash(arguments.model),
        "rope_factor": arguments.rope_factor,
        "problems": len(problems),
        "prompts": hashlib.sha256(repr([(p.task_id, p.prompt, p.suffix) for p in problems.values()]).encode()).hexdigest(),
        "total": len(problems) * arguments.samples,
        **drawn,
        **counts,
    }
    generate_samples(model, tokenizer, list(problems.values()), Sampling(**drawn), SampleFile(samples_file, settings), **counts)
    return settings


def describe(result: dict[str, Any]) -> str:
    """For whoever started the command: a line for the loss, a line for the scores."""
    lines = []
    if "loss" in result:
        lines.append(
            f"loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}, "
            f"{result['bits_per_byte']:.4f} bits per byte ({result['tokens']:,} tokens)"
        )
    for name in [name for name in result if name.startswith("pass@") and not name.endswith("_interval")]:
        low, high = result[f"{name}_interval"]
        lines.append(f"{name} {result[name]:.4f} (95 %: {low:.4f} to {high:.4f})")
    if "isolation" in result:
        walls = ", ".join(wall for wall, held in result["isolation"].items() if held is True)
        lines.append(f"{result['samples']} samples of {result['problems']} problems, {result['passed']} passed; sandbox: ")
        lines[-1] += f"{result['isolation']['level']}, holds for {walls or 'nothing'}"
    return "\n".join(lines)
