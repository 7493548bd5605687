"""From the command line to the answer as one dict, which `--json` prints and `show` words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.cli import UserError
from data.files import replace_json
from launch.engine import strategy
from launch.engine.refused import check_compile, check_names_optimizer, check_refused
from launch.nested import differing
from launch.planning.arguments import PlanArguments
from launch.planning.devices import Device, find_device
from launch.planning.job import Job, job_from, micro_batches
from launch.planning.ladder import Ladder, active_parameters
from launch.planning.memory import GB, WORST_LOAD
from launch.planning.scale import ScalingPoint, curve
from launch.planning.search import SAFE_SHARE, Candidate, as_deepspeed, candidate, least_change, search
from launch.planning.time import USUAL_LOAD
from launch.planning.unread import check_unread
from launch.words import SECONDS_PER_DAY
from model.accounting import count_parameters, training_flops_per_token
from model.config_json import find_model, load_sizes
from model.sizes import ModelSizes

#: How far a global batch may move for a better micro-batch: far less than changes a learning rate (as the square root of it).
NEAR = 0.05


def answer(arguments: PlanArguments) -> dict[str, Any]:
    """What `arguments` ask for. Raises `UserError`; writes the JSON of `--write`."""
    device, sizes = find_device(arguments.gpu or ""), read_sizes(arguments.model)
    path = arguments.deepspeed_config or strategy.default_path(arguments.num_gpus, arguments.ranks, sizes.n_routed_experts)
    base = strategy.read_config(path)
    doubts = check_unread(base, path)
    config, to_train = with_batch_for(strategy.with_mode(base, arguments.activation_checkpointing), arguments.ranks)
    planned = candidate(read_job(arguments, sizes, config, path), device)
    better = search(planned.job, device)
    found = {
        "model": arguments.model,
        "gpu": device.name,
        "num_gpus": arguments.num_gpus,
        "num_nodes": arguments.num_nodes,
        "gpus": arguments.ranks,
        "deepspeed_config": str(path),
        "doubts": doubts,
        "sequence_length": planned.job.sequence_length,
        **describe(planned),
        **budget(planned, arguments.tokens, arguments.price),
        "expected": expected(arguments, planned.job),
        "to_train": to_train,
        "to_fit": to_fit(planned, config),
        "alternatives": [layout(one) for one in better],
        "curve": [point(one) for one in curve(planned.job, device)],
        "assumptions": assumptions(device),
    }
    if arguments.write is not None:
        found["written"] = write(arguments.write, better, base)
    return found


def read_sizes(model: str) -> ModelSizes:
    """`load_sizes`, whose refusals are the user's to mend."""
    try:
        return load_sizes(model)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None


def with_batch_for(base: dict[str, Any], ranks: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """`base` with a batch that `ranks` can share out, and what of it had to change, `[from, to]` by key.

    Training refuses a batch that was made for another number of GPUs; a plan shows what it would have to be. The global batch
    stays where every rank gets as many sequences of it, else it becomes one near it that does (`share_near`).
    """
    train, micro, accumulation = strategy.given_batch(base)
    unit = ranks * (micro or 1) * (accumulation or 1)
    if train is None or train == unit or (train % unit == 0 and None in (micro, accumulation)):
        return base, {}
    share = share_near(train / ranks, micro)
    fitting = max(micro_batches(share, micro or share))
    wanted = (share * ranks, micro and fitting, accumulation and share // fitting)
    pairs = {name: [base[name], new] for name, new in zip(strategy.BATCH, wanted, strict=True) if new and base[name] != new}
    return {**base, **{name: new for name, (_, new) in pairs.items()}}, pairs


def share_near(exact: float, micro: int | None) -> int:
    """Sequences of a step that each rank gets, for an `exact` share that may be no whole number.

    Not merely the nearest: that may be a prime, 37 for 256 sequences on 7 GPUs, which only micro-batches of one sequence divide.
    So the one that the largest micro-batch up to `micro` divides, as long as it is near.
    """
    nearest = max(1, round(exact))
    if micro is None or exact == nearest:
        return nearest
    multiples = (size * round(exact / size) for size in range(min(micro, nearest), 0, -1))
    return next((share for share in multiples if abs(share - exact) <= NEAR * exact), nearest)


def read_job(arguments: PlanArguments, sizes: ModelSizes, base: dict[str, Any], path: Path) -> Job:
    """The job that `launch/train.py` would run under the same flags, refused where `strategy` or `refused` refuses it.

    Not checked: what only DeepSpeed and torch know of keys and values. Training refuses it (`engine/keys.py`), by asking these
    libraries, which take seconds to import.
    """
    length = arguments.sequence_length or sizes.usual_context
    if length > sizes.max_position_embeddings:
        raise UserError(
            f"--sequence_length {length} is beyond the {sizes.max_position_embeddings} positions of {arguments.model}; copy the "
            f'model\'s config.json ({find_model(arguments.model)}) with "max_position_embeddings": {length} '
            "and no rope_parameters (a trained model is extended by train.py --init_from with --rope_factor)"
        )
    resolved = strategy.resolve_config(base, path, world_size=arguments.ranks, num_experts=sizes.n_routed_experts, max_steps=1000)
    check_compile(resolved, path, documents=False)
    check_names_optimizer(resolved, path)
    check_refused(resolved, path)
    strategy.check_precision(resolved, path)
    return job_from(
        sizes,
        resolved,
        ranks=arguments.ranks,
        ranks_per_node=arguments.num_gpus,
        sequence_length=length,
    )


def describe(found: Candidate) -> dict[str, Any]:
    """Parameters, batch, memory and time of one layout."""
    job, memory, time = found.job, found.memory, found.time
    count = count_parameters(job.sizes)
    return {
        "parameters": {"total": count.total, "active": count.active, "on_a_rank": job.local_parameters},
        "flops_per_token": training_flops_per_token(job.sizes, job.sequence_length),
        "batch": {
            "micro_batch": job.micro_batch_size,
            "accumulation": job.accumulation_steps,
            "global_batch": job.global_batch,
            "tokens_per_step": job.tokens_per_step,
        },
        "layout": layout(found),
        "memory_gb": memory.in_gb(),
        "memory_gb_at_worst_load": round((memory.total + memory.worst) / GB, 4),
        "device_memory_gb": round(found.device.memory / GB, 4),
        "fits": found.fits,
        "fits_at_worst_load": found.fits_at_worst,
        "seconds_per_step": time.total,
        "tokens_per_second": found.tokens_per_second,
        "tokens_per_second_per_gpu": found.tokens_per_second / job.ranks,
        "mfu": time.mfu(job, found.device),
        "limits": {name: round(share, 4) for name, share in time.limits},
        "communication": [
            {"kind": t.kind, "link": t.link, "gb": t.bytes / GB, "messages": t.messages, "seconds": t.seconds} for t in time.traffic
        ],
    }


def layout(found: Candidate) -> dict[str, Any]:
    """One row of the table of alternatives."""
    job = found.job
    return {
        "expert_ranks": job.ep_size,
        "zero_stage": job.zero_stage,
        "activation_checkpointing": job.activation_checkpointing,
        "micro_batch": job.micro_batch_size,
        "accumulation": job.accumulation_steps,
        "offload_optimizer": job.offloads_optimizer,
        "memory_gb": round(found.memory.total / GB, 4),
        "fits": found.fits,
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.time.mfu(job, found.device),
    }


def point(one: ScalingPoint) -> dict[str, Any]:
    """One row of the curve."""
    return {"gpus": one.gpus, **layout(one.found), "global_batch": one.found.job.global_batch, "breaks": one.breaks}


def to_fit(found: Candidate, config: dict[str, Any]) -> dict[str, list[object]]:
    """What to change of the JSON, `config`, to make it fit by the fewest decisions, `[from, to]` by key, null for a key that is not
    there; none where it fits or nothing helps."""
    helped = None if found.fits else least_change(found.job, found.device)
    return {key: [old, new] for key, old, new in differing(config, as_deepspeed(helped, config))} if helped else {}


def budget(found: Candidate, tokens: float | None, price: float | None) -> dict[str, Any]:
    """Steps, days, energy and cost of a budget of tokens; null where the budget or the price is not given."""
    seconds = None if tokens is None else tokens / found.tokens_per_second
    return {
        "tokens": tokens,
        "steps": None if tokens is None else max(1, round(tokens / found.job.tokens_per_step)),
        **expense(found.job.ranks, seconds, found.device, price),
    }


def expense(gpus: int, seconds: float | None, device: Device | None, price: float | None) -> dict[str, Any]:
    """Days, GPU hours, energy and cost of so many seconds; null where what they are made of is not known."""
    gpu_hours = None if seconds is None else gpus * seconds / 3600
    return {
        "days": None if seconds is None else seconds / SECONDS_PER_DAY,
        "gpu_hours": gpu_hours,
        "energy_kwh": None if gpu_hours is None or device is None else gpu_hours * device.watts / 1000,
        "price_per_gpu_hour": price,
        "cost": None if gpu_hours is None or price is None else gpu_hours * price,
    }


def expected(arguments: PlanArguments, job: Job) -> dict[str, Any] | None:
    """By the saved ladder: bits per byte, and the learning rate and batch to begin with; None without one."""
    if arguments.ladder is None or arguments.tokens is None:
        return None
    ladder, sizes = Ladder.read(arguments.ladder), job.sizes
    active = active_parameters(sizes)
    flops = arguments.tokens * training_flops_per_token(sizes, job.sequence_length)
    return {"active": active, **ladder.expectation(active, arguments.tokens, flops, sizes.hidden_size, sizes.vocab_size)}


def assumptions(device: Device) -> list[str]:
    """What the figures rest on, for who has to believe them."""
    e = device.efficiency
    return [
        f"{device.name}: {device.bf16_tflops:g} TFLOP/s dense bf16, {device.memory_gib:g} GiB, {device.memory_gbs:g} GB/s, "
        f"{device.link} {device.link_gbs:g} GB/s, network {device.network_gbits:g} Gbit/s a GPU ({device.source})",
        f"shares of the peak reached, assumed: products {e.matrix:.0%}, narrow ones {e.narrow:.0%}, head {e.head:.0%}, "
        f"attention {e.attention:.0%}, memory {e.memory:.0%}; no GPU has been measured beside them yet",
        f"the fullest rank has {USUAL_LOAD:g} times the mean of the routed rows; memory at worst load has {WORST_LOAD:g} times; a "
        f"layout that is proposed then takes {SAFE_SHARE:.0%} of the card at most",
        "tensors: formulas, checked against real engines on a CPU and a count of what the GPU's kernels keep; runtime (context, "
        "NCCL, allocator) is an estimate",
        "energy: the boards at their limit; hosts, network and cooling are not in it",
    ]


def write(path: Path, better: list[Candidate], base: dict[str, Any]) -> str:
    """The best layout as a DeepSpeed JSON at `path`."""
    if not better:
        raise UserError(f"--write {path}: no layout fits; take more GPUs, larger ones, or a shorter --sequence_length")
    if not path.parent.is_dir():
        raise UserError(f"--write {path}: there is no folder {path.parent}")
    if path.exists():
        raise UserError(f"--write {path} exists; name a new file")
    replace_json(path, as_deepspeed(better[0], base))
    return str(path)
