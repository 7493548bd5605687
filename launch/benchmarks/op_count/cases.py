"""What the roofline counts: our model as it trains, and its peers, on `meta` tensors and one rank of many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from torch import nn

from launch.benchmarks.contestants import gpu_knobs, peer_model
from launch.benchmarks.op_count.cuda_kernels import prefers_triton
from launch.engine import activation_checkpointing, expert_parallel
from launch.ranks.builds import compile_nothing
from model import MoEGPTConfig, MoEGPTForCausalLM


def join_fake_group(ranks: int) -> None:
    """This process is rank 0 of `ranks` that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        compile_nothing()
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def with_auto_ep(model: nn.Module, ep: int, **knobs: Any) -> nn.Module:
    """The model with its MoE layers swapped by AutoEP, as `deepspeed.initialize` does it."""
    auto_ep = AutoEP(model, parse_autoep_config({"enabled": True, "autoep_size": ep, "preset_model": "deepseek_v3", **knobs}))
    specs = auto_ep.ep_parser()
    with torch.device("meta"):
        auto_ep.replace_moe_layers(specs, ep_size=ep, ep_rank=0)
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "ep_group_name")]
    for layer in layers:
        layer.ep_group = dist.group.WORLD if ep > 1 else None
    return model


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is counted: of which model one rank of how many, with which recomputation, and for which GPU."""

    config: MoEGPTConfig
    ep: int = 1
    mode: str = "none"
    capability: tuple[int, int] | None = None


def ours(case: Case) -> nn.Module:
    with torch.device("meta"):
        model = MoEGPTForCausalLM(case.config)
    with expert_parallel.model_parts(case.config):
        with_auto_ep(model, case.ep)
    return _trained(model, case)


def stock(case: Case, **knobs: Any) -> nn.Module:
    """AutoEP as it comes: before sm90 with DeepSpeed's Triton product, from there on with torch's `_grouped_mm` (0.19.8:
    `GroupedExperts` in deepspeed/moe/ep_experts.py, `prefer_triton_grouped_mm` in deepspeed/accelerator/cuda_accelerator.py). Its
    rate is that of ours, and with one expert on the rank a plain product's; autotuning is not counted."""
    with mock.patch.object(type(get_accelerator()), "prefer_triton_grouped_mm", lambda _: prefers_triton(case.capability)):
        model = with_auto_ep(peer_model(case.config, device="meta"), case.ep, **knobs)
    return _trained(model, case)


def glm(case: Case) -> nn.Module:
    """Plain transformers, all experts on each rank, by `F.grouped_mm` wherever there is one, sm80 too (`_can_use_grouped_mm` in
    transformers/integrations/moe.py, 5.23), though torch has a loop there that waits for the device (`model.heuristics`)."""
    model = peer_model(case.config, device="meta")
    model.set_experts_implementation("grouped_mm")
    return _trained(model, case)


def _trained(model: Any, case: Case) -> nn.Module:
    activation_checkpointing.enable(model, case.mode, {})
    trained: nn.Module = nn.Module.to(model, torch.bfloat16).train()
    return trained


Contestant = Callable[[Case], nn.Module]
#: Beside ours with the recomputation that is asked for, ours with each.
OURS: dict[str, Contestant] = {
    "ours": ours,
    "ours, selective": lambda case: ours(replace(case, mode="selective")),
    "ours, full": lambda case: ours(replace(case, mode="full")),
}
PEERS: dict[str, Contestant] = {
    "stock AutoEP": stock,
    "stock AutoEP with knobs": lambda case: stock(case, **gpu_knobs(case.capability)),
    "transformers Glm4Moe": glm,
}
CONTESTANTS = {**OURS, **PEERS}
