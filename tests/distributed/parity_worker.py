"""Trains the same model on the same data in every layout that this number of ranks allows, and writes what came out.

    parity_worker.py REFERENCE OUTPUT every|some

`REFERENCE` has the weights after training in plain PyTorch on one process; each layout reports how far it is from them.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import traceback
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from parity_problem import BIAS_RATE, CLIP, GLOBAL_BATCH, LEARNING_RATE, ROUTINGS, STEPS, batch, build, counted_lifts, set_bias
from torch import Tensor

from launch.cli import make_quiet
from launch.engine.build import build_engine
from launch.engine.expert_parallel import moe_layers
from launch.engine.step_hook import StepHook
from launch.ranks import join
from model.balance import LoadBalancer


def layouts(ranks: int, every: bool) -> list[dict[str, Any]]:
    """EP x ZeRO x accumulation x checkpointing x clipping x routing: all of them, or some in which each value occurs."""
    names = ("accumulation", "checkpointing", "clip", "routing")
    chosen = list(product((1, 4), ("none", "selective", "full"), (False, True), ROUTINGS))
    sizes = [e for e in (1, 2, 4) if e <= ranks]
    if not every:
        chosen = [
            (1, "none", True, "one expert"),
            (4, "full", True, "uneven"),
            (4, "selective", False, "empty experts"),
        ]
        sizes = sizes[-2:]
    cases = [(ep, zero, c) for ep in sizes for zero in (0, 1, 2, 3) for c in chosen]
    if not every:
        cases += [(sizes[-1], 2, (4, mode, True, "by quantiles")) for mode in ("none", "selective", "full")]
    return [{"ep": ep, "zero": zero, **dict(zip(names, c, strict=True))} for ep, zero, c in cases]


def deepspeed_config(case: dict[str, Any]) -> dict[str, Any]:
    per_rank = GLOBAL_BATCH // dist.get_world_size()
    return {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": per_rank // case["accumulation"],
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_clipping": CLIP if case["clip"] else 0.0,
        "steps_per_print": 2**31,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case["zero"], "reduce_bucket_size": 5000, "allgather_bucket_size": 5000,
                              "stage3_param_persistence_threshold": 0},  # small buckets: many, and parameters that straddle them
        "expert_parallel": {"enabled": True, "autoep_size": case["ep"], "preset_model": "deepseek_v3", "use_grouped_mm": False},
        "activation_checkpointing": {"mode": case["checkpointing"]},
    }  # fmt: skip


def train(case: dict[str, Any], reference: dict[str, Tensor]) -> dict[str, Any]:
    for held in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):  # DeepSpeed keeps them for a process's life
        getattr(groups, held).clear()
        getattr(groups, f"{held}_RANKS").clear()
    engine = build_engine(build(case["routing"]), deepspeed_config(case))
    set_bias(moe_layers(engine.module), case["routing"])
    hook = StepHook(engine, clip=CLIP if case["clip"] else 0.0)
    balancer = LoadBalancer(engine.module, BIAS_RATE, dist.all_reduce, rule=engine.module.config.router_balance)
    before = whole_weights(engine)
    if case["checkpointing"] == "none":  # of no consequence: all that follows is the reference's, which never saw it
        step(engine, hook, balancer, STEPS, reason="refused")
    rows = [step(engine, hook, balancer, number) for number in range(STEPS)]
    after = whole_weights(engine)
    out = {name: [row[name] for row in rows] for name in rows[0]}
    out["bias"] = [layer.router.e_score_correction_bias.tolist() for layer in moe_layers(engine.module)]
    out.update(distance(before, after, reference))
    engine.destroy()
    return {**case, "ranks": dist.get_world_size(), **out}


def step(engine: Any, hook: StepHook, balancer: LoadBalancer, number: int, reason: str | None = None) -> dict[str, Any]:
    """One step on batch `number`; with a `reason` it is refused."""
    rank, ranks, accumulation = dist.get_rank(), dist.get_world_size(), engine.gradient_accumulation_steps()
    micro, total = engine.train_micro_batch_size_per_gpu(), torch.zeros((), dtype=torch.float64)
    for part in range(accumulation):
        first = (part * ranks + rank) * micro
        inputs, targets = (x[first : first + micro] for x in batch(number))
        loss = engine(input_ids=inputs, shift_labels=targets).loss
        engine.backward(loss)
        total += loss.detach() / accumulation / ranks
        if part < accumulation - 1:
            engine.step()
    dist.all_reduce(total)
    held = [layer.router.load_E.view(layer.ep_size, -1).sum(1) for layer in moe_layers(engine.module)]
    fewest = int(torch.stack(held).min())  # tokens of this rank for the rank that it sends fewest to
    lifts = torch.tensor(counted_lifts(layer.router for layer in moe_layers(engine.module)))
    dist.all_reduce(lifts)
    assert hook.step(lambda norm: reason) == reason
    if reason is not None:
        balancer.reset()
        return {}
    health = balancer.step()
    return {
        "loss": float(total),
        "norm": hook.grad_norm,
        "imbalance": health["load_max_over_mean"],
        "fewest": fewest,
        "lifts": lifts.tolist(),
    }


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """All weights under the model's own names, experts of all ranks in order."""
    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            value = parameter.detach().clone()
        if not getattr(parameter, "allreduce", True):
            group = groups._get_expert_parallel_group(parameter.group_name)
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, value.contiguous(), group=group)
            value = torch.cat(parts)
        weights[name.replace("mlp.router.gate.", "mlp.gate.")] = value
    for name in [n for n in weights if n.endswith("experts.w1")]:
        stem = name[: -len("w1")]
        weights[f"{stem}gate_up_proj"] = torch.cat([weights.pop(name), weights.pop(f"{stem}w3")], dim=1)
        weights[f"{stem}down_proj"] = weights.pop(f"{stem}w2")
    return weights


def distance(before: dict[str, Tensor], after: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any]:
    """Largest relative difference (2-norm, by tensor) of weights, and of what training changed in them."""
    assert after.keys() == reference.keys(), sorted(after.keys() ^ reference.keys())
    weights, changes = {}, {}
    for name, wanted in reference.items():
        error = float((after[name].double() - wanted.double()).norm())
        weights[name] = error / float(wanted.double().norm())
        changes[name] = error / max(float((wanted.double() - before[name].double()).norm()), 1e-12)
    worst = list(changes)[np.argmax(list(changes.values()))]  # a NaN before all, which Python's maximum passes over
    return {"weights": float(np.max(list(weights.values()))), "changes": changes[worst], "worst": re.sub(r"^model\.", "", worst)}


def main() -> None:
    make_quiet()
    join.set_environment()
    join.start(timeout=120)
    references = torch.load(sys.argv[1], weights_only=True)
    results = []
    for case in layouts(dist.get_world_size(), every=sys.argv[3] == "every"):
        try:
            results.append(train(case, references[f"{case['routing']}, clip {case['clip']}"]))
        except Exception:
            results.append({**case, "ranks": dist.get_world_size(), "error": traceback.format_exc()})
        gc.collect()
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
