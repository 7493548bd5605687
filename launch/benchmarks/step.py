"""A whole training step: ours beside Glm4Moe under stock AutoEP, with and without its knobs, and both without DeepSpeed.

python launch/benchmark.py step --model 800m --layers 4 --deepspeed_config ds_configs/ep1_zero2.json
deepspeed --num_gpus 8 launch/benchmark.py step --model 800m --deepspeed_config ds_configs/ep8_zero2.json

Same sizes, tokens, optimizer, recomputation. Each has a process of its own on every rank, as whoever uses it has; all are alive at
once and take turns step by step, so that a machine that is busy is busy for all of them, and a ratio is the median of what pairs
of such steps give.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.flags import at_least_one
from launch.benchmarks.contestant_processes import PHASES, TIMEOUT, Remote, contestants
from launch.engine.strategy import CHECKPOINTING_MODES
from model.config_json import ATTENTION_IMPLEMENTATIONS

if TYPE_CHECKING:
    from launch.planning.job import Job

RATIOS = ("ratio", "ratio_without_optimizer", "cpu_ratio")
COLUMNS = (*(f"{phase}_ms" for phase in PHASES), "total_ms", "tokens_per_second_per_rank", *RATIOS)
UNTIMED = 2
#: Of a peer's logits, which it holds whole where our loss goes chunk by chunk: in bf16 and fp32, and gradients. `benchmark.py
#: roofline` counts 8.2 GB at 16,384 tokens of `800m`.
LOGIT_BYTES = 10
#: A process's CUDA context. Assumption of `launch/planning/memory.py`, NCCL aside.
CONTEXT = 0.5e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="a preset or a config.json")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--vocabulary", type=int, help="vocabulary size, if not the model's")
    parser.add_argument("--deepspeed_config", type=Path, help="default: what launch/train.py takes for this number of ranks")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences per rank")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each contestant, after two untimed ones")
    parser.add_argument(
        "--attn_implementation", choices=ATTENTION_IMPLEMENTATIONS, default="flash", help="our attention; peers use sdpa"
    )
    parser.add_argument(
        "--activation_checkpointing", choices=CHECKPOINTING_MODES, help="mode for all contestants; default: the JSON's"
    )
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="run only these of the table, besides ours")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """`{"contestants": {name: {"forward_ms", ..., "total_ms", "tokens_per_second_per_rank", "ratio", ...}}}` on every rank."""
    from launch.benchmarks.contestants import OURS, Stage
    from launch.benchmarks.measure import print_table, settings_of
    from launch.ranks import join

    at_least_one(arguments, "layers", "vocabulary", "sequence_length", "micro_batch", "accumulation", "steps")
    rank, ranks = join.set_environment()
    names = chosen(arguments.contestants, ranks)
    with contestants(names, arguments) as remotes:
        join.start(TIMEOUT, backend="gloo")  # to agree on turns; the contestants have groups of their own
        stage = Stage(arguments)
        check_room(names, stage, ranks, arguments)
        seconds = take_turns(remotes, arguments.steps)
    mode = stage.strategy.activation_checkpointing
    result: dict[str, Any] = {
        "settings": settings_of(arguments) | {"json": str(stage.path), "recomputation": mode},
        "ranks": ranks,
        "contestants": {name: summary(seconds[name], seconds[OURS], stage, arguments) for name in names},
    }
    result["predicted"] = prediction(stage, ranks, arguments, result["contestants"][OURS]["total_ms"] / 1e3)
    if rank == 0:
        rows = [[name, *(result["contestants"][name][column] for column in COLUMNS)] for name in names]
        print_table(title(arguments, stage.path, mode, ranks), ["", *COLUMNS], rows)
        print("ratio: how many times as long as ours, median over turns; cpu_ratio: in CPU time, which a busy machine changes less")
        if predicted := result["predicted"]:
            ms, mfu = predicted["total_ms"], predicted["mfu"]
            ratio = predicted["measured_to_predicted"]
            print(f"ours by the plan for {predicted['device']}: {ms:.4g} ms, MFU {mfu:.1%}; measured is {ratio:.3g} times that")
    return result


def prediction(stage: Any, ranks: int, arguments: argparse.Namespace, seconds: float) -> dict[str, Any] | None:
    """Of our step, beside the measured one; None on a device that the planner has no data of, such as a CPU."""
    from launch.engine.hardware import gpu_name
    from launch.planning.expectation import beside_measured

    return beside_measured(job_of(stage, ranks, arguments), gpu_name(), seconds)


def job_of(stage: Any, ranks: int, arguments: argparse.Namespace, **sizes: int) -> Job:
    """Our step as the planner knows it, with other sizes of the model where given."""
    from launch.planning.job import job_from
    from model.sizes import ModelSizes

    return job_from(
        ModelSizes.of({**stage.config.to_dict(), **sizes}),
        stage.settings,
        ranks=ranks,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
        sequence_length=arguments.sequence_length,
    )


def together(names: Sequence[str], job: Job) -> float:
    """Bytes of a GPU that they take at least, all at once: what one has needed its allocator keeps while it sleeps.

    Ours by the plan, a peer as much and its logits. Not counted: what its activations take beyond ours, by `roofline` half as much
    again and more.
    """
    from launch.planning.memory import plan_memory

    peers = sum(not name.startswith("ours") for name in names)
    logits = LOGIT_BYTES * job.tokens * job.sizes.vocab_size
    return len(names) * (plan_memory(job).live + CONTEXT) + peers * logits


def check_room(names: Sequence[str], stage: Any, ranks: int, arguments: argparse.Namespace) -> None:
    """Raises AgreedError where they do not fit onto a GPU together, with how many layers would. Collective."""
    import torch
    import torch.distributed as dist

    from data.terminal import say
    from launch.cli import AgreedError
    from launch.toolchain import trains_on_gpu

    if not trains_on_gpu():
        return
    free = torch.tensor(torch.cuda.mem_get_info()[0], dtype=torch.float64)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)

    def needed(layers: int) -> float:
        return together(names, job_of(stage, ranks, arguments, num_hidden_layers=layers))

    layers = stage.config.num_hidden_layers
    least, room = needed(layers), float(free)
    what = f"the {len(names)} contestants share a GPU and need at least {least / 1e9:.1f} GB of it, {room / 1e9:.1f} GB"
    if least > room:
        fitting = max((n for n in range(1, layers) if needed(n) <= room), default=0)
        fewer = f"--layers {fitting} or " if fitting else ""
        raise AgreedError(f"{what} are free; take {fewer}fewer --contestants, a smaller --micro_batch or --sequence_length")
    if dist.get_rank() == 0:
        say(f"{what} are free")


def chosen(wanted: Sequence[str] | None, ranks: int) -> list[str]:
    """The contestants by name, ours first. Raises UserError for one that is not."""
    from data.cli import UserError
    from launch.benchmarks.contestants import ALONE, CONTESTANTS, OURS

    here = [name for name in CONTESTANTS if ranks == 1 or name not in ALONE]
    if wanted is None:
        return here
    for name in wanted:
        if name not in here:
            on = "one rank" if ranks == 1 else f"{ranks} ranks"
            raise UserError(f"--contestants {name!r} is none of {', '.join(map(repr, here))}, which is who there is on {on}")
    return [name for name in here if name == OURS or name in wanted]


def take_turns(remotes: Sequence[Remote], steps: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each phase of each timed step. The order turns as well: who comes after whom matters to caches."""
    import torch.distributed as dist

    for remote in remotes:  # one after the other: each holds most while it builds
        remote.build()
    found: dict[str, list[dict[str, float]]] = {remote.name: [] for remote in remotes}
    for turn in range(UNTIMED + steps):
        for place in range(len(remotes)):
            remote = remotes[(place + turn) % len(remotes)]
            dist.barrier()
            seconds = remote.step()
            if turn >= UNTIMED:
                found[remote.name].append(seconds)
    return found


def summary(
    steps: list[dict[str, float]], ours: list[dict[str, float]], stage: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Medians, the paired ratios, and every step."""
    from launch.engine.hardware import gpu_name
    from launch.planning.devices import device_of
    from model.accounting import training_flops_per_token

    totals, ours_totals = ([sum(step[phase] for phase in PHASES) for step in each] for each in (steps, ours))
    computing, ours_computing = ([step["forward"] + step["backward"] for step in each] for each in (steps, ours))
    cpu, ours_cpu = ([step["cpu"] for step in each] for each in (steps, ours))
    tokens = arguments.micro_batch * arguments.sequence_length * arguments.accumulation
    speed = tokens / statistics.median(totals)
    row: dict[str, Any] = {f"{phase}_ms": 1e3 * statistics.median(step[phase] for step in steps) for phase in PHASES}
    row.update(total_ms=1e3 * statistics.median(totals), tokens_per_second_per_rank=speed)
    row.update(ratio=paired(totals, ours_totals), ratio_without_optimizer=paired(computing, ours_computing))
    row["cpu_ratio"] = paired(cpu, ours_cpu)
    if device := device_of(gpu_name()):
        row["mfu"] = speed * training_flops_per_token(stage.config, arguments.sequence_length) / device.peak
    row["steps"] = steps
    return row


def paired(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def title(arguments: argparse.Namespace, path: Path, mode: str, ranks: int) -> str:
    cut = f" cut to {arguments.layers} layers" if arguments.layers else ""
    shape = f"{arguments.micro_batch} x {arguments.sequence_length} tokens, {arguments.accumulation} micro-batches"
    return (
        f"step of {arguments.model}{cut}, {ranks} ranks, {path.name}, {shape}, recomputation {mode}; medians of {arguments.steps}"
    )
