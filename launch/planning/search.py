"""Other ways to run the same job: which of them fit, and which are fastest."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.engine.strategy import CHECKPOINTING_MODES
from launch.nested import lookup
from launch.planning.devices import Device
from launch.planning.job import Job, micro_batches
from launch.planning.memory import Memory, plan_memory
from launch.planning.time import StepTime, plan_time

#: A micro-batch of more tokens fills a GPU no better, and one of many sequences makes a long step longer to wait for.
MOST_TOKENS = 65_536
#: Of a card's memory, what a layout that is proposed may take even when routing goes wrong: formulas are off by some percent, and
#: a desktop or another process wants some.
SAFE_SHARE = 0.85
#: Layouts that are proposed.
PROPOSED = 5


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A job on a device, with what it needs and takes."""

    job: Job
    device: Device
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        """At an even load of the experts."""
        return self.memory.total <= self.device.memory

    @property
    def fits_at_worst(self) -> bool:
        """Also where routing sends a rank `memory.WORST_LOAD` times its share."""
        return self.memory.total + self.memory.worst <= self.device.memory

    @property
    def is_safe(self) -> bool:
        """At the worst load too, with a margin."""
        return self.memory.total + self.memory.worst <= SAFE_SHARE * self.device.memory

    @property
    def tokens_per_second(self) -> float:
        return self.time.tokens_per_second(self.job)


def candidate(job: Job, device: Device) -> Candidate:
    return Candidate(job=job, device=device, memory=plan_memory(job), time=plan_time(job, device))


def search(job: Job, device: Device) -> list[Candidate]:
    """The fastest that fit safely, the best of each layout, fastest first; same global batch."""
    best: dict[tuple[int, int, bool], Candidate] = {}
    for variant in variants(job):
        found = candidate(variant, device)
        layout = (variant.ep_size, variant.zero_stage, variant.offloads_optimizer)
        if found.is_safe and (layout not in best or _order(found) < _order(best[layout])):
            best[layout] = found
    return sorted(best.values(), key=_order)[:PROPOSED]


def _order(found: Candidate) -> tuple[float, int, int, float]:
    """Fastest first; where two are as fast within 1 %, the lower ZeRO stage, less recomputation and the smaller one."""
    job = found.job
    speed = -round(math.log(found.tokens_per_second) / 0.01)
    return speed, job.zero_stage, CHECKPOINTING_MODES.index(job.activation_checkpointing), found.memory.total


def variants(job: Job) -> Iterator[Job]:
    """Every layout that training takes, at the same sequence length and global batch."""
    # Muon's offload and ZeRO 3 are refused by training (`engine/refused.py`), and ZeRO 1 with sums in a type of their own by
    # BF16_Optimizer.
    muon = job.is_muon
    first = [(1, False)] * (not muon or job.gradient_bytes == job.weight_bytes)
    stages = first + [(2, False)] + [(2, True)] * (not muon) + [(3, False)] * (not muon and not job.compiles)
    batches = micro_batches(job.global_batch // job.ranks, max(1, MOST_TOKENS // job.sequence_length))
    for ep_size in _ep_sizes(job):
        for stage, offload in stages:
            for micro_batch in batches:
                for mode in CHECKPOINTING_MODES:
                    yield dataclasses.replace(
                        job,
                        ep_size=ep_size,
                        zero_stage=stage,
                        offloads_optimizer=offload,
                        fused_optimizer=not offload and (job.fused_optimizer or job.offloads_optimizer),  # as it is written
                        micro_batch_size=micro_batch,
                        accumulation_steps=job.global_batch // (job.ranks * micro_batch),
                        activation_checkpointing=mode,
                    )


def _ep_sizes(job: Job) -> list[int]:
    """Sizes that divide the experts and the ranks and stay inside a node, where the exchange has the fast links."""
    common = math.gcd(job.sizes.n_routed_experts, min(job.ranks, job.ranks_per_node))
    return [n for n in range(1, common + 1) if common % n == 0]


def changes(job: Job, other: Job) -> int:
    """In how many decisions two layouts differ; each may be several keys of the file."""
    decisions = ("ep_size", "zero_stage", "offloads_optimizer", "micro_batch_size", "activation_checkpointing")
    return sum(getattr(job, name) != getattr(other, name) for name in decisions)


def least_change(job: Job, device: Device) -> Candidate | None:
    """Of all layouts that fit safely, the one with the fewest changes, and of those the fastest; None where none fits."""
    fitting = (found for found in (candidate(variant, device) for variant in variants(job)) if found.is_safe)
    return min(fitting, key=lambda found: (changes(job, found.job), -found.tokens_per_second), default=None)


def as_deepspeed(found: Candidate, base: dict[str, Any]) -> dict[str, Any]:
    """`base`, an unresolved DeepSpeed JSON, changed to the candidate's layout."""
    config, job = copy.deepcopy(base), found.job
    config["train_batch_size"] = job.global_batch
    config["train_micro_batch_size_per_gpu"] = job.micro_batch_size
    config["gradient_accumulation_steps"] = "auto"
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = job.zero_stage
    was_offloaded = lookup(zero, "offload_optimizer.device", "none") != "none"
    for key in ("offload_optimizer", "offload_param"):
        zero.pop(key, None)
    if job.zero_stage == 3:
        for key in ("reduce_scatter", "allgather_bucket_size"):
            zero.pop(key, None)
    else:
        zero["reduce_scatter"] = zero["contiguous_gradients"] = True  # AutoEP wants both there
        for key in [key for key in zero if key.startswith("stage3_")]:
            del zero[key]
    if job.offloads_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        for key in ("torch_adam", "fused"):
            config.get("optimizer", {}).get("params", {}).pop(key, None)  # DeepSpeed's CPU Adam takes over
    elif was_offloaded and job.optimizer.lower() in ("adam", "adamw"):
        config["optimizer"].setdefault("params", {}).update(torch_adam=True, fused=True)  # DeepSpeed's own wants the CUDA toolkit
    config.setdefault("expert_parallel", {"enabled": True, "preset_model": "deepseek_v3"})["autoep_size"] = job.ep_size
    config.setdefault("activation_checkpointing", {})["mode"] = job.activation_checkpointing
    return config
