"""What one micro-step costs a GPU, counted operation by operation without one, and the time and MFU that this predicts.

Ours beside stock AutoEP, the same with its knobs on, and plain transformers Glm4Moe with grouped_mm. Bytes, kernels, saved
bytes and host waits are counts; times are a model: each operation takes as long as its FLOPs at the device's reached rate, its
bytes at its reached bandwidth, or the shortest kernel, whichever is longest (`launch/planning/devices.py` has the rates and
their sources). Not in it: caches, hosts slower than the device, imbalance, overlap of communication. Expect 15 %.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.benchmarks import counted
from launch.benchmarks.counting import Count, Entry, Ledger
from launch.benchmarks.measure import print_table
from launch.engine.build import load_model_config
from launch.planning.devices import Device, find_device
from launch.planning.time import HELD_BYTES, SHARD_BYTES, STEP_BYTES
from launch.profiling.parts import parts_of
from model import MoEGPTConfig
from model.accounting import count_parameters, training_flops_per_token

#: Seconds of the shortest kernel on a busy GPU; assumed.
SHORTEST_KERNEL = 2.5e-6
#: A product narrower than this reaches less; several experts in one grouped product reach this share of a plain one; assumed.
NARROW, GROUPED = 1024, 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="800m", help="a preset or a config.json")
    parser.add_argument("--gpu", default="a100-80gb", help="a name in launch/planning/devices.json")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts; one rank's share is counted")
    parser.add_argument("--sequence_length", type=int, default=2048)
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences of a rank")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-steps of an optimizer step")
    parser.add_argument("--chart", type=Path, help="also draw the times by part there, as SVG")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of each contestant the counts of a layer, the predicted time by part and kind, and the MFU."""
    device, config = find_device(arguments.gpu), load_model_config(arguments.model)
    counted.join_fake_group(arguments.ep)
    settings = {k: str(v) for k, v in vars(arguments).items()}
    result: dict[str, Any] = {"prediction": True, "settings": settings}
    for name, make in counted.CONTESTANTS.items():
        shape = (arguments.micro_batch, arguments.sequence_length)
        one, two = (count_micro_step(make, config, layers, shape, arguments.ep) for layers in (1, 2))
        result[name] = Prediction(one, two, config, device, shape, arguments.accumulation, arguments.ep).summary()
    show(result, device)
    if arguments.chart:
        from launch.benchmarks.bars import draw

        draw(arguments.chart, {name: result[name]["parts"] for name in counted.CONTESTANTS}, title(settings, device))
    return result


def count_micro_step(make: Any, config: MoEGPTConfig, layers: int, shape: tuple[int, int], ep: int) -> Ledger:
    """Forward and backward of a model with this many layers."""
    settings = MoEGPTConfig.from_dict({**config.to_dict(), "num_hidden_layers": layers})
    settings._attn_implementation = "flash"
    model = make(settings, ep).train()
    ids = torch.empty(shape, dtype=torch.int64, device="meta")
    is_ours = type(model).__name__ == "MoEGPTForCausalLM"
    batch = {"shift_labels": ids, "num_items_in_batch": torch.empty((), device="meta")} if is_ours else {"labels": ids}
    rows = ids.numel() * config.num_experts_per_tok
    with counted.as_on_cuda(rows), Count(parts_of(model, "dispatch and combine")) as count:
        loss = model(input_ids=ids, **batch).loss
        count.end_forward()
        loss.backward()
    return count.ledger


@dataclass(frozen=True)
class Prediction:
    """From the counts of one layer and of two: a layer is their difference, the rest is outside the layers."""

    one: Ledger
    two: Ledger
    config: MoEGPTConfig
    device: Device
    shape: tuple[int, int]
    accumulation: int
    ep: int

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    def layer(self, what: str, kinds: set[str] | None = None) -> float:
        return self.two.total(what, kinds) - self.one.total(what, kinds)

    def seconds(self) -> dict[tuple[str, str], float]:
        """By part and kind, of one micro-step of the whole model and its share of the optimizer step."""
        times: dict[tuple[str, str], float] = defaultdict(float)
        layers = self.config.num_hidden_layers
        for ledger, factor in ((self.two, layers - 1), (self.one, 2 - layers)):
            for entry in ledger.entries:
                times[entry.part, entry.kind] += factor * operation_seconds(entry, self.device)
        count = count_parameters(self.config)
        dense, experts = count.total - count.routed_experts, count.routed_experts / self.ep
        shard = dense / self.ep + experts
        moved = HELD_BYTES * (dense + experts) + (SHARD_BYTES + STEP_BYTES / self.accumulation) * shard
        times["optimizer", "elementwise and sums"] = moved / self.device.memory_speed
        return times

    def summary(self) -> dict[str, Any]:
        times = self.seconds()
        total = sum(times.values())
        flops = self.tokens * training_flops_per_token(self.config, self.shape[1])
        beside = {e.kind for e in self.two.entries} - {"matrix product", "attention"}
        parts: dict[str, float] = defaultdict(float)
        kinds: dict[str, float] = defaultdict(float)
        for (part, kind), value in times.items():
            parts[part] += value
            kinds[kind] += value
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
            "mfu": flops / total / self.device.peak,
            "parts": dict(sorted(parts.items(), key=lambda pair: -pair[1])),
            "families": {kind: self._family(kind, value) for kind, value in sorted(kinds.items(), key=lambda pair: -pair[1])},
        }

    def _family(self, kind: str, seconds: float) -> dict[str, float]:
        per_token = {f"{what}_per_token_layer": self.layer(what, {kind}) / self.tokens for what in ("bytes", "flops")}
        return {"seconds": seconds, "launches_per_layer": self.layer("launches", {kind}), **per_token}


def operation_seconds(entry: Entry, device: Device) -> float:
    """The longest of arithmetic, memory, link and launch."""
    reached = device.efficiency
    rate = 1.0
    if entry.kind == "attention":
        rate = reached.attention
    elif entry.shape:
        narrow = min(n for n in entry.shape[:3]) < NARROW
        rate = reached.head if entry.part == "loss" else reached.narrow if narrow else reached.matrix
        rate *= GROUPED if entry.shape[3] > 1 else 1.0
    arithmetic = entry.flops / (device.peak * rate)
    link = entry.sent / device.link_speed
    return max(arithmetic, entry.bytes / device.memory_speed, link, entry.launches * SHORTEST_KERNEL)


def title(settings: dict[str, str], device: Device) -> str:
    shape = f"{settings['micro_batch']} x {settings['sequence_length']} tokens"
    return f"{settings['model']} on {device.name}, EP {settings['ep']}, {shape}: predicted ms of a micro-step"


def show(result: dict[str, Any], device: Device) -> None:
    names = list(counted.CONTESTANTS)
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
    parts = sorted({part for name in names for part in result[name]["parts"]})
    rows += [[f"  ms in {part}", *(1e3 * result[name]["parts"].get(part, 0.0) for name in names)] for part in parts]
    print_table(title(result["settings"], device) + " (counted and modelled, not measured)", ["", *names], rows)
