"""What a token costs as the batch grows and as the experts become more: time, bytes through memory, memory held.

Tokens grow by whole sequences, so that a token's attention stays what it is. Experts grow from one to eight at the same active
FLOPs: each token goes to one expert of the same width. Time and peak memory are measured here, forward and backward of our model
without DeepSpeed; bytes and kernels are counted as `benchmark.py roofline` counts them, for a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from data.flags import at_least_one
from launch.benchmarks.measure import add_measuring_flags, peak_bytes, print_table, seconds_each, settings_of
from launch.benchmarks.op_count.cases import Case, join_fake_group, ours
from launch.benchmarks.op_count.counter import OpCounts
from launch.benchmarks.roofline import count_micro_step
from launch.model_config import load_model_config
from launch.toolchain import default_device
from model import MoEGPTConfig, MoEGPTForCausalLM

COLUMNS = (
    *("us_per_token", "kb_moved_per_token", "flops_per_token", "kernels", "held_kb_per_token", "peak_mb"),
    "peak_kb_per_more_token",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_cpu = default_device() == "cpu"
    add_measuring_flags(parser, repeats=2, dtypes=())
    parser.add_argument("--model", default="tiny" if on_cpu else "800m", help="a preset or a config.json that gives the widths")
    parser.add_argument("--layers", type=int, default=2, help="number of layers")
    parser.add_argument("--vocabulary", type=int, default=4096, help="vocabulary size")
    parser.add_argument("--sequence_length", type=int, default=256 if on_cpu else 2048, help="tokens in a sequence")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16_384, 32_768], help="token counts of a rank")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of experts")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """`{"tokens": {number: row}, "experts": {number: row}}`, rows with `COLUMNS`; prints both tables."""
    at_least_one(arguments, "layers", "vocabulary", "sequence_length", "tokens", "experts", "repeats")
    join_fake_group(1)
    widths = {"num_hidden_layers": arguments.layers, "vocab_size": arguments.vocabulary}
    config = load_model_config(arguments.model, **widths)
    batches = [max(1, tokens // arguments.sequence_length) for tokens in arguments.tokens]
    middle = batches[len(batches) // 2]
    by_tokens = {batch * arguments.sequence_length: (config, batch) for batch in batches}
    by_experts = {experts: (with_experts(config, experts), middle) for experts in arguments.experts}
    result: dict[str, Any] = {"settings": settings_of(arguments)}
    for what, cases in (("tokens", by_tokens), ("experts", by_experts)):
        rows = measure(cases, arguments)
        if what == "tokens":
            add_slopes(rows)
        result[what] = rows
        columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
        title = f"{arguments.model}, {arguments.layers} layers, {arguments.device}, by {what}"
        print_table(title, [what, *columns], [[name, *(row.get(c, "") for c in columns)] for name, row in rows.items()])
    return result


def with_experts(config: MoEGPTConfig, experts: int) -> MoEGPTConfig:
    """Each token to one of so many experts, as wide together as what a token used before."""
    changes = {
        "n_routed_experts": experts,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": config.moe_intermediate_size * config.num_experts_per_tok,
    }
    return MoEGPTConfig.from_dict({**config.to_dict(), **changes})


def measure(cases: dict[int, tuple[MoEGPTConfig, int]], arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Of each case the figures of a micro-step; the cases take turns."""
    device, length = torch.device(arguments.device), arguments.sequence_length
    calls = {str(name): micro_step(config, (batch, length), device) for name, (config, batch) in cases.items()}
    seconds = seconds_each(calls, device, arguments.repeats)
    rows = {}
    for name, (config, batch) in cases.items():
        counts, tokens = count(config, (batch, length)), batch * length
        rows[name] = {
            "us_per_token": 1e6 * seconds[str(name)] / tokens,
            **figures(counts, tokens),
            "peak_mb": peak_bytes(calls[str(name)], device) / 2**20,
        }
    return rows


def count(config: MoEGPTConfig, shape: tuple[int, int]) -> OpCounts:
    return count_micro_step(ours, Case(config=config), config.num_hidden_layers, shape)


def figures(counts: OpCounts, tokens: int) -> dict[str, float]:
    """Of a whole micro-step, layers and loss."""
    return {
        "kb_moved_per_token": counts.total("bytes") / tokens / 1024,
        "flops_per_token": counts.total("flops") / tokens,
        "kernels": counts.total("launches"),
        "held_kb_per_token": counts.held / tokens / 1024,
    }


def add_slopes(rows: dict[int, dict[str, float]]) -> None:
    """What each further token adds to the peak: the same everywhere where memory is linear."""
    names = sorted(rows)
    for before, name in pairwise(names):
        rows[name]["peak_kb_per_more_token"] = 1024 * (rows[name]["peak_mb"] - rows[before]["peak_mb"]) / (name - before)


def micro_step(config: MoEGPTConfig, shape: tuple[int, int], device: torch.device) -> Callable[[], None]:
    """Forward and backward of a model of its own."""
    config = MoEGPTConfig.from_dict(config.to_dict())
    config._attn_implementation = "flash"
    torch.manual_seed(0)
    with device:
        model = MoEGPTForCausalLM(config).bfloat16().train()
    ids = torch.randint(0, config.vocab_size, shape, device=device)

    def once() -> None:
        model(ids, shift_labels=ids).loss.backward()
        model.zero_grad()

    return once
