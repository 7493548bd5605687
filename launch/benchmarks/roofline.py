"""What one micro-step costs a GPU, counted operation by operation without one, and the time and MFU that this predicts.

Ours beside stock AutoEP, the same with its knobs on, and plain transformers Glm4Moe with grouped_mm. Bytes, kernels, saved
bytes and host waits are counts; times are a model: each operation takes as long as its FLOPs at the device's reached rate, its
bytes at its reached bandwidth, what it sends at the link's, or the shortest kernel, whichever is longest
(`launch/planning/devices.json` has the rates, and which are assumed). `mfu` is of that and of the optimizer step's passes. What is
not counted is the planner's model, apart from it, in `whole_step`: ZeRO's collectives and the starts of the exchanges, the
fullest rank's rows, the host. Not in it: caches, overlap of exchanges, ZeRO 3's gathering. No GPU has been measured beside it yet.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.cli import UserError
from data.flags import at_least_one
from launch.benchmarks.measure import print_table, settings_of
from launch.benchmarks.op_count import cases
from launch.benchmarks.op_count.counter import Count, Entry, OpCounts
from launch.benchmarks.op_count.cuda_kernels import as_on_cuda
from launch.benchmarks.svg import svg_path
from launch.benchmarks.svg_bars import draw
from launch.engine import strategy
from launch.model_config import load_model_config
from launch.nested import lookup
from launch.planning.communication import traffic
from launch.planning.devices import Device, find_device
from launch.planning.job import Job, job_from
from launch.planning.time import USUAL_LOAD, exposed, optimizer_seconds
from launch.profiling.parts import parts_of
from model import MoEGPTConfig
from model.accounting import training_flops_per_token
from model.sizes import ModelSizes

#: What an operation can take its time for.
LIMITS = ("FLOPs", "bytes", "link", "launches")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="800m", help="a preset or a config.json")
    parser.add_argument("--gpu", default="a100-80gb", help="a name in launch/planning/devices.json")
    parser.add_argument("--deepspeed_config", type=Path, help="a DeepSpeed JSON for what is not given here")
    parser.add_argument("--ep", type=int, help="expert-parallel size; the share of one rank is counted (default: 1)")
    parser.add_argument("--num_gpus", type=int, help="GPUs in the node (default: the expert-parallel size)")
    parser.add_argument("--sequence_length", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--micro_batch", type=int, help="sequences per rank (default: the JSON's, or 8)")
    parser.add_argument("--accumulation", type=int, help="micro-steps per optimizer step (default: the JSON's, or 8)")
    modes = strategy.CHECKPOINTING_MODES
    parser.add_argument("--activation_checkpointing", choices=modes, help="mode for all contestants; default: the JSON's, or none")
    parser.add_argument("--chart", type=svg_path, metavar="SVG", help="also draw a chart of the times by part")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of each contestant the counts of a layer, the predicted time by part, kind and limit, and the MFU."""
    device, config = find_device(arguments.gpu), load_model_config(arguments.model)
    job = job_of(arguments, config)
    cases.join_fake_group(job.ep_size)
    mode, capability = job.activation_checkpointing, device.efficiency.compute_capability
    case = cases.Case(config=config, ep=job.ep_size, mode=mode, capability=capability)
    settings = settings_of(arguments) | {
        "ep": str(job.ep_size),
        "num_gpus": str(job.ranks),
        "micro_batch": str(job.micro_batch_size),
        "accumulation": str(job.accumulation_steps),
        "activation_checkpointing": mode,
    }
    result: dict[str, Any] = {"prediction": True, "settings": settings}
    for name, make in cases.CONTESTANTS.items():
        one, two = (count_micro_step(make, case, layers, (job.micro_batch_size, job.sequence_length)) for layers in (1, 2))
        result[name] = Prediction(one, two, job_as(name, job), device).summary()
    show(result, device)
    if arguments.chart:
        draw(arguments.chart, {name: result[name]["parts"] for name in cases.CONTESTANTS}, title(settings, device))
    return result


def job_of(arguments: argparse.Namespace, config: MoEGPTConfig) -> Job:
    """What trains: by the JSON that is given, or `ep8_zero2.json` with this command's defaults; flags override either."""
    at_least_one(arguments, "ep", "num_gpus", "sequence_length", "micro_batch", "accumulation")
    given = arguments.deepspeed_config
    path = given or strategy.CONFIG_FOLDER / "ep8_zero2.json"
    settings = strategy.with_mode(strategy.read_config(path), arguments.activation_checkpointing)
    ep = arguments.ep or (lookup(settings, "expert_parallel.autoep_size", 1) if given else 1)
    ranks = arguments.num_gpus or ep
    if ep < 1 or ranks % ep:
        raise UserError(f"--num_gpus {ranks} is no multiple of the {ep} ranks that share the experts")
    flags = {"train_micro_batch_size_per_gpu": arguments.micro_batch, "gradient_accumulation_steps": arguments.accumulation}
    batch = ({} if given else dict.fromkeys(flags, 8)) | {name: value for name, value in flags.items() if value}
    settings |= batch
    if batch and all(isinstance(settings.get(name), int) for name in flags):
        settings["train_batch_size"] = "auto"  # follows; where one of the two is "auto", that one follows from it
    settings["expert_parallel"] = {**settings.get("expert_parallel", {}), "autoep_size": ep}
    experts = config.n_routed_experts
    resolved = strategy.resolve_config(settings, path, world_size=ranks, num_experts=experts, max_steps=1000)
    return job_from(
        ModelSizes.of(config.to_dict()),
        resolved,
        ranks=ranks,
        ranks_per_node=ranks,
        sequence_length=arguments.sequence_length,
    )


def job_as(name: str, job: Job) -> Job:
    """What differs in a contestant's own: its recomputation, or that it has all experts on each rank."""
    changes = {"ours, selective": {"activation_checkpointing": "selective"}, "ours, full": {"activation_checkpointing": "full"}}
    return replace(job, **changes.get(name, {"ep_size": 1} if name == "transformers Glm4Moe" else {}))


def count_micro_step(make: cases.Contestant, case: cases.Case, layers: int, shape: tuple[int, int]) -> OpCounts:
    """Forward and backward of a model with this many layers."""
    settings = MoEGPTConfig.from_dict({**case.config.to_dict(), "num_hidden_layers": layers})
    settings._attn_implementation = "flash"
    model = make(replace(case, config=settings))
    ids = torch.empty(shape, dtype=torch.int64, device="meta")
    is_ours = type(model).__name__ == "MoEGPTForCausalLM"
    batch = {"shift_labels": ids, "num_items_in_batch": torch.empty((), device="meta")} if is_ours else {"labels": ids}
    rows = ids.numel() * case.config.num_experts_per_tok
    with as_on_cuda(rows, case.capability), Count(parts_of(model, "dispatch and combine")) as count:
        loss = model(input_ids=ids, **batch).loss
        count.end_forward()
        loss.backward()
    return count.counts


@dataclass(frozen=True)
class Prediction:
    """From the counts of one layer and of two: a layer is their difference, the rest is outside the layers."""

    one: OpCounts
    two: OpCounts
    job: Job
    device: Device

    @property
    def tokens(self) -> int:
        return self.job.tokens

    def layer(self, what: str, kinds: set[str] | None = None) -> float:
        return self.two.total(what, kinds) - self.one.total(what, kinds)

    def weighed(self) -> list[tuple[Entry, int]]:
        """The operations of the whole model, with how often each is done."""
        layers = self.job.sizes.num_hidden_layers
        pairs = ((self.two, layers - 1), (self.one, 2 - layers))
        return [(entry, factor) for counts, factor in pairs for entry in counts.entries]

    def seconds(self) -> dict[tuple[str, str, str], float]:
        """By part, kind and limit, of one micro-step of the whole model and its share of the optimizer step."""
        times: dict[tuple[str, str, str], float] = defaultdict(float)
        for entry, factor in self.weighed():
            limit, seconds = operation_seconds(entry, self.device)
            times[entry.part, entry.kind, limit] += factor * seconds
        passes = optimizer_seconds(self.job, self.device) / self.job.accumulation_steps
        times["optimizer", "elementwise and sums", "bytes"] = passes
        return times

    def summary(self) -> dict[str, Any]:
        times = self.seconds()
        total = sum(times.values())
        beside = {e.kind for e in self.two.entries} - {"matrix product", "attention"}
        return {
            "bytes_per_token_layer": self.layer("bytes") / self.tokens,
            "bytes_per_token_layer_beside_products": self.layer("bytes", beside) / self.tokens,
            "launches_per_layer": self.layer("launches"),
            "saved_bytes_per_token_layer": (self.two.held - self.one.held) / self.tokens,
            "saved_bytes_beside_layers": 2 * self.one.held - self.two.held,
            "loss_bytes_at_most": self.one.most_forward - self.one.held,
            "host_waits_per_layer": self.two.host_waits.total() - self.one.host_waits.total(),
            "all_to_all_bytes_per_token_layer": self.layer("sent", {"all-to-all"}) / self.tokens,
            "flops_per_token_layer": self.layer("flops") / self.tokens,
            "seconds": total,
            "mfu": self.mfu(total),
            "parts": added(times, 0),
            "limits": added(times, 2),
            "families": {kind: self._family(kind, times) for kind in added(times, 1)},
            "whole_step": self.whole_step(total),
        }

    def mfu(self, seconds: float) -> float:
        flops = self.tokens * training_flops_per_token(self.job.sizes, self.job.sequence_length)
        return flops / seconds / self.device.peak

    def _family(self, kind: str, times: dict[tuple[str, str, str], float]) -> dict[str, Any]:
        per_token = {f"{what}_per_token_layer": self.layer(what, {kind}) / self.tokens for what in ("bytes", "flops")}
        limits = added({key: value for key, value in times.items() if key[1] == kind}, 2)
        found = {"seconds": sum(limits.values()), "limited_by": next(iter(limits)), "limits": limits}
        return {**found, "launches_per_layer": self.layer("launches", {kind}), **per_token}

    def whole_step(self, counted_seconds: float) -> dict[str, float]:
        """A micro-step with what is not counted, by the planner's model of it, in seconds; and its MFU."""
        job, load = self.job, USUAL_LOAD if self.job.ep_size > 1 else 1.0
        each = [(entry, factor * operation_seconds(entry, self.device)[1]) for entry, factor in self.weighed()]
        backward = sum(seconds for entry, seconds in each if entry.backward)
        exchanged = sum(seconds for entry, seconds in each if entry.kind == "all-to-all")
        sent = traffic(job, self.device, load)
        more = {
            "collectives": exposed(sent, job.accumulation_steps * backward) / job.accumulation_steps - exchanged,
            "uneven experts": (load - 1) * sum(s for e, s in each if e.part == "experts" and e.kind == "matrix product"),
        }
        kernels = sum(factor * entry.launches for entry, factor in self.weighed())
        everywhere = self.device.everywhere
        host = everywhere.host_kernel * kernels + everywhere.host_step / job.accumulation_steps
        more["host"] = max(0.0, host - counted_seconds - sum(more.values()))
        total = counted_seconds + sum(more.values())
        return {**more, "seconds": total, "mfu": self.mfu(total)}


def added(times: dict[tuple[str, str, str], float], which: int) -> dict[str, float]:
    """By one member of the key, largest first."""
    found: dict[str, float] = defaultdict(float)
    for key, seconds in times.items():
        found[key[which]] += seconds
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def operation_seconds(entry: Entry, device: Device) -> tuple[str, float]:
    """Which of `LIMITS` takes longest, and how long."""
    reached, everywhere = device.efficiency, device.everywhere
    rate = 1.0
    if entry.kind == "attention":
        rate = reached.attention
    elif entry.shape:
        narrow = min(n for n in entry.shape[:3]) < everywhere.narrow_below
        rate = reached.head if entry.part == "loss" else reached.narrow if narrow else reached.matrix
        rate *= reached.grouped if entry.shape[3] > 1 else 1.0
    each = (
        entry.flops / (device.peak * rate),
        entry.bytes / device.memory_speed,
        entry.sent / device.link_speed,
        entry.launches * everywhere.shortest_kernel,
    )
    return max(zip(LIMITS, each, strict=True), key=lambda pair: pair[1])


def title(settings: dict[str, str], device: Device) -> str:
    shape = f"{settings['micro_batch']} x {settings['sequence_length']} tokens"
    return f"{settings['model']} on {device.name}, EP {settings['ep']}, {shape}: predicted ms of a micro-step"


def show(result: dict[str, Any], device: Device) -> None:
    names = list(cases.CONTESTANTS)
    rows: list[list[object]] = []
    figures = {
        "KB moved a token and layer": ("bytes_per_token_layer", 1e-3),
        "  beside products, attention": ("bytes_per_token_layer_beside_products", 1e-3),
        "kernels a layer": ("launches_per_layer", 1),
        "KiB saved a token and layer": ("saved_bytes_per_token_layer", 1 / 1024),
        "host waits a layer": ("host_waits_per_layer", 1),
        "ms of a micro-step": ("seconds", 1e3),
        "MFU, %": ("mfu", 100),
    }
    for label, (key, factor) in figures.items():
        rows.append([label, *(float(result[name][key]) * factor for name in names)])
    steps = [result[name]["whole_step"] for name in names]
    rows.append(["MFU of the whole step, %", *(100 * step["mfu"] for step in steps)])
    rows += [[f"  ms more, {what}", *(1e3 * step[what] for step in steps)] for what in ("collectives", "uneven experts", "host")]
    parts = sorted({part for name in names for part in result[name]["parts"]})
    rows += [[f"  ms in {part}", *(1e3 * result[name]["parts"].get(part, 0.0) for name in names)] for part in parts]
    rows += [[f"  ms by {limit}", *(1e3 * result[name]["limits"].get(limit, 0.0) for name in names)] for limit in LIMITS]
    kinds = {kind: None for name in names for kind in result[name]["families"]}
    rows += [[f"  ms of {kind}", *(_limited(result[name]["families"].get(kind)) for name in names)] for kind in kinds]
    print_table(title(result["settings"], device) + " (counted and modelled, not measured)", ["", *names], rows)


def _limited(family: dict[str, Any] | None) -> str:
    """Milliseconds, and by what the most of them."""
    return "0" if family is None else f"{1e3 * family['seconds']:.4g} {family['limited_by']}"
