"""What launch/evaluate.py does: the loss, then the samples, then their scores, in one JSON object."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.cli import UserError, counted
from data.files import check_replaceable, replace_json
from data.terminal import say, stdout, write_out
from launch.evaluation.arguments import EvaluateArguments
from launch.evaluation.problems import Problem, read_problems
from launch.evaluation.samples import SampleFile
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.scoring import check_workers, prepare_isolation, score

DRAWN = ("temperature", "top_p", "max_new_tokens", "seed")  # of Sampling
COUNTS = ("samples", "batch_size")


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """The result, which is printed as it comes and written to --output. What can be refused is, before a model is loaded."""
    for path in filter(None, (arguments.output, arguments.samples_file)):
        check_replaceable(path)
    task = arguments.task
    problems = read_problems(task, arguments.task_file, most=arguments.problems) if task else {}
    limits = Limits(seconds=arguments.execution_timeout)
    isolation = prepare_isolation(arguments.isolation, limits, required=arguments.require_isolation) if task else None
    workers = check_workers(arguments.workers, isolation.level) if isolation else 0
    result = with_model(arguments, problems) if arguments.needs_model else {}
    if isolation:
        scores = score(arguments.samples_path, problems, isolation=isolation, limits=limits, workers=workers)
        result = {**scores, "task": task, **result}
    write(arguments.output, result)
    if task:
        tell(describe_scores(result), arguments.output)
    return result


def write(output: Path | None, result: dict[str, Any]) -> None:
    if output:
        replace_json(output, result)


def tell(text: str, output: Path | None) -> None:
    """For a person where the result goes to a file; else it is the result, and what keeps it from being written is an error."""
    if output:
        say(text, stdout)
    else:
        with suppress(BrokenPipeError):  # `| head` has seen enough
            write_out(text)


def with_model(arguments: EvaluateArguments, problems: dict[str, Problem]) -> dict[str, Any]:
    """The loss where --data is given, and samples.jsonl where a task is and --score is not.

    What can be refused is before the loss is measured, which is printed before the samples are made, and written where no earlier
    result would be replaced by it alone.
    """
    from launch.evaluation.generation import check_infilling, generate_samples, short_of_context
    from launch.exported.model import load_exported
    from launch.generation.sampling import Sampling
    from launch.toolchain import default_device

    sampling = Sampling(**{name: getattr(arguments, name) for name in DRAWN})
    model, tokenizer = load_exported(
        arguments.model_folder,
        device=default_device(),
        attn_implementation=arguments.attn_implementation,
        rope_factor=arguments.rope_factor,
    )
    result: dict[str, Any] = {"model": str(arguments.model)}
    if arguments.makes_samples:
        asked = list(problems.values())
        check_infilling(tokenizer, asked)
        short = short_of_context(model, tokenizer, asked, sampling)
        if short:
            many = f"{counted(len(short), 'prompt')} of {len(asked)}"
            say(f"warning: {many} leave less than --max_new_tokens of the model's context, {short[0]} the first of them")
        file = sample_file(arguments, problems)
        file.begin(arguments.batch_size)
    if arguments.data:
        result |= loss_of(arguments, model)
        if arguments.output and not arguments.output.exists():
            write(arguments.output, result)
        tell(describe_loss(result), arguments.output)
    if arguments.makes_samples:
        counts = {name: getattr(arguments, name) for name in COUNTS}
        generate_samples(model, tokenizer, asked, sampling, file, **counts)
        result |= {"sampling": file.settings, "short_of_context": len(short)}
    return result


def loss_of(arguments: EvaluateArguments, model: Any) -> dict[str, Any]:
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
        check_tokenizer((arguments.model_folder / "tokenizer.json").read_bytes(), data)
        splits.append((str(folder), data))
    return measure(model, splits, batch_size=arguments.batch_size, batches=arguments.eval_batches)


def sample_file(arguments: EvaluateArguments, problems: dict[str, Problem]) -> SampleFile:
    """Noted with it: all that the samples depend on."""
    from launch.exported.files import weights_hash

    settings = {
        "task": arguments.task,
        "model": str(arguments.model),
        "weights": weights_hash(arguments.model_folder),
        "rope_factor": arguments.rope_factor,
        "problems": len(problems),
        "prompts": hashlib.sha256(repr([(p.task_id, p.prompt, p.suffix) for p in problems.values()]).encode()).hexdigest(),
        "total": len(problems) * arguments.samples,
        **{name: getattr(arguments, name) for name in (*DRAWN, *COUNTS)},
    }
    return SampleFile(arguments.samples_path, settings)


def describe_loss(result: dict[str, Any]) -> str:
    return (
        f"loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte ({result['tokens']:,} tokens)"
    )


def describe_scores(result: dict[str, Any]) -> str:
    lines = []
    for name in [name for name in result if name.startswith("pass@") and not name.endswith("_interval")]:
        low, high = result[f"{name}_interval"]
        lines.append(f"{name} {result[name]:.4f} (95 %: {low:.4f} to {high:.4f})")
    walls = ", ".join(wall for wall, held in result["isolation"].items() if held is True)
    lines.append(f"{result['samples']} samples of {result['problems']} problems, {result['passed']} passed; sandbox: ")
    lines[-1] += f"{result['isolation']['level']}, holds for {walls or 'nothing'}"
    return "\n".join(lines)
