"""A whole training step under DeepSpeed: ours beside transformers' Glm4Moe under stock AutoEP, the same sizes and JSON.

python launch/benchmark.py step --model 800m --deepspeed_config ds_configs/ep1_zero2.json
deepspeed --num_gpus 8 launch/benchmark.py step --model 800m --deepspeed_config ds_configs/ep8_zero2.json

The peer has no sinks, its router multiplies in bf16, and its loss holds full logits: what one would train without this
project.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "n_routed_experts", "num_experts_per_tok"),
    *("n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="a preset or a config.json")
    parser.add_argument("--deepspeed_config", type=Path, default=Path("ds_configs/cpu_ep1_zero2.json"))
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences of a rank; one micro-batch a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round, after two that are not")
    parser.add_argument("--rounds", type=int, default=3, help="ours and the peer in turn, so that drift meets both")
    parser.add_argument("--attn_implementation", choices=("flash", "sdpa", "eager"), default="flash")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)


def peer_model(config: Any, device: str | None = None) -> Any:
    """Glm4Moe of the same sizes: the same parameters but for the sinks. On this rank's device, or on another."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes = {name: getattr(config, name) for name in SIZES}
    theirs = Glm4MoeConfig(
        **sizes,
        first_k_dense_replace=0,
        use_qk_norm=config.qk_norm,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
    )
    theirs._attn_implementation = "sdpa"
    theirs.scoring_func = config.scoring_func  # AutoEP reads it
    with torch.device(device or get_accelerator().current_device_name()):
        return Glm4MoeForCausalLM(theirs)


def make_engine(arguments: argparse.Namespace, ours: bool) -> Any:
    import deepspeed
    import torch.distributed as dist

    from launch.engine import strategy
    from launch.engine.build import build_engine, build_model, load_model_config, parameter_groups

    config = load_model_config(arguments.model)
    path, ranks = arguments.deepspeed_config, dist.get_world_size()
    settings = strategy.read_config(path)
    settings.update(train_micro_batch_size_per_gpu=arguments.micro_batch, train_batch_size=arguments.micro_batch * ranks)
    settings["gradient_accumulation_steps"] = 1
    settings = strategy.resolve_config(settings, path, world_size=ranks, num_experts=config.n_routed_experts, max_steps=1000)
    if ours:
        return build_engine(build_model(config, seed=0, attn_implementation=arguments.attn_implementation), settings)
    settings["activation_checkpointing"].pop("mode", None)  # in stock DeepSpeed the section does nothing
    model = peer_model(config)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model, 0.01), config=settings)
    return engine


def round_of(arguments: argparse.Namespace, ours: bool) -> dict[str, float]:
    """Median seconds of a step and peak memory, of a fresh engine."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    engine = make_engine(arguments, ours)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(0, 4096, (arguments.micro_batch, arguments.sequence_length + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous().to(engine.device), tokens[:, 1:].contiguous().to(engine.device)
    # transformers names shifted targets the same, but computes them beside `labels`
    batch = {"input_ids": inputs, "shift_labels": targets} if ours else {"input_ids": inputs, "labels": inputs}
    seconds = []
    for _ in range(arguments.steps + 2):
        dist.barrier()
        began = time.perf_counter()
        engine.backward(engine(**batch).loss)
        engine.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    engine.destroy()
    del engine
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return {"seconds": statistics.median(seconds[2:]), "peak_gb": peak}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch.distributed as dist

    from launch.engine.build import load_model_config
    from launch.engine.hardware import peak_flops
    from launch.ranks import join
    from model.accounting import training_flops_per_token

    join.set_environment()
    join.start(timeout=600)
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for _ in range(arguments.rounds):
        for ours in (True, False):
            found[ours].append(round_of(arguments, ours))
    tokens = arguments.micro_batch * arguments.sequence_length
    flops, peak = training_flops_per_token(load_model_config(arguments.model), arguments.sequence_length), peak_flops()
    result: dict[str, Any] = {"model": arguments.model, "ranks": dist.get_world_size()}
    for name, ours in (("ours", True), ("stock AutoEP", False)):
        seconds = statistics.median(row["seconds"] for row in found[ours])
        row = {"tokens_per_second_per_rank": tokens / seconds, "peak_gb": max(row["peak_gb"] for row in found[ours])}
        if peak:
            row["mfu"] = tokens / seconds * flops / peak
        result[name] = row
    ratios = [peer["seconds"] / own["seconds"] for own, peer in zip(found[True], found[False], strict=True)]
    result["speed_ratio"] = statistics.median(ratios)
    if dist.get_rank() == 0:
        for name in ("ours", "stock AutoEP"):
            print(f"{name:>14}: " + "  ".join(f"{k} {v:,.3f}" for k, v in result[name].items()))
        print(f"{'ratio':>14}: ours is {result['speed_ratio']:.2f} x as fast (median of {arguments.rounds} rounds, {ratios})")
    return result
