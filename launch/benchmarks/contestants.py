"""Who takes part in `benchmark.py step`: one training step in three phases, of our engine and of what one would use instead.

The peers under AutoEP have no sinks, route in bf16 and hold full logits. What goes without DeepSpeed has bf16 weights with fp32
masters, clipping and fused AdamW: the arithmetic of ZeRO on one rank.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.moe.ep_experts as ep_experts
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from launch.engine import activation_checkpointing, strategy
from launch.engine.build import build_engine, build_model, parameter_groups, without_our_keys
from launch.engine.strategy import Strategy
from launch.model_config import load_model_config
from launch.toolchain import trains_on_gpu
from model import MoEGPTConfig

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "n_routed_experts", "num_experts_per_tok"),
    *("n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
)


def peer_model(config: Any, device: str | None = None) -> Any:
    """Glm4Moe of the same sizes: the same parameters but for the sinks. On this rank's device, or on another."""
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


class Contestant:
    """`forward` and `backward` of a micro-batch, then `update`; `is_ours` takes shifted targets."""

    def __init__(self, name: str, model: Any, *, is_ours: bool, accumulation: int) -> None:
        self.name, self.model, self.is_ours, self.accumulation = name, model, is_ours, accumulation

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        # transformers names shifted targets the same, but computes them beside `labels`
        batch = {"input_ids": inputs, "shift_labels": targets} if self.is_ours else {"input_ids": inputs, "labels": inputs}
        loss: Tensor = self.model(**batch).loss
        return loss

    def backward(self, loss: Tensor, *, last: bool) -> None:
        raise NotImplementedError

    def update(self) -> None:
        raise NotImplementedError


class UnderDeepSpeed(Contestant):
    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.model.backward(loss)
        if not last:
            self.model.step()  # only counts

    def update(self) -> None:
        self.model.step()


class Plain(Contestant):
    """bf16 weights, fp32 masters, gradients summed in fp32, clipping, fused AdamW."""

    def __init__(self, name: str, model: nn.Module, *, clip: float, rate: float, **more: Any) -> None:
        super().__init__(name, model.to(torch.bfloat16).train(), **more)
        self.clip = clip
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [nn.Parameter(p.detach().float()) for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss / self.accumulation).backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None:
                if master.grad is None:
                    master.grad = weight.grad.float()
                else:
                    master.grad += weight.grad
            weight.grad = None

    def update(self) -> None:
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)


def gpu_knobs(capability: tuple[int, int] | None) -> dict[str, Any]:
    """AutoEP's own for speed, as far as DeepSpeed accepts them on a GPU of this compute capability; None: one of AMD's."""
    chosen: dict[str, Any] = {"use_grouped_mm": True, "async_split_plan": True}
    if capability is not None:
        chosen["combine_impl"] = "fused_weighted_sum"
    # With one packed product DeepSpeed refuses NVIDIA's GPUs before sm90, where its own Triton kernel takes gate and up apart.
    return chosen if capability is not None and capability < (9, 0) else {**chosen, "gate_up_impl": "fused"}


def knobs() -> dict[str, Any]:
    """Those for this device."""
    if trains_on_gpu():
        return gpu_knobs(None if torch.version.hip else torch.cuda.get_device_capability())
    # Grouped products, which DeepSpeed runs on a CPU once its activation does not ask for Triton.
    for name in ("apply_expert_activation", "apply_packed_expert_activation"):
        setattr(ep_experts, name, functools.partial(getattr(ep_experts, name), fused=False))
    return {"use_grouped_mm": True, "gate_up_impl": "fused"}


class Stage:
    """What all contestants share: sizes, the JSON, recomputation."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        overrides = {"num_hidden_layers": arguments.layers, "vocab_size": arguments.vocabulary}
        self.config = load_model_config(arguments.model, **{k: v for k, v in overrides.items() if v})
        ranks, experts = dist.get_world_size(), self.config.n_routed_experts
        gpus = torch.cuda.device_count() if trains_on_gpu() else 0
        path = arguments.deepspeed_config or strategy.default_path(gpus, ranks, experts)
        settings = strategy.with_mode(strategy.read_config(path), arguments.activation_checkpointing)
        settings["train_batch_size"] = arguments.micro_batch * arguments.accumulation * ranks
        settings["train_micro_batch_size_per_gpu"] = arguments.micro_batch
        settings["gradient_accumulation_steps"] = arguments.accumulation
        self.settings = strategy.resolve_config(settings, path, world_size=ranks, num_experts=experts, max_steps=1000)
        self.strategy = Strategy.of(self.settings)
        self.path: Path = path

    def ours(self, name: str) -> Contestant:
        model = build_model(self._config(), seed=0, attn_implementation=self.arguments.attn_implementation)
        return self._engine(name, build_engine(model, self.settings), is_ours=True)

    def stock(self, name: str, **expert_parallel: Any) -> Contestant:
        settings = {**self.settings, "expert_parallel": {**self.settings["expert_parallel"], **expert_parallel}}
        model, chosen = peer_model(self.config), Strategy.of(settings)
        activation_checkpointing.enable(model, chosen.activation_checkpointing, settings)
        groups = parameter_groups(model, chosen.weight_decay)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=without_our_keys(settings, chosen))
        return self._engine(name, engine, is_ours=False)

    def plain_ours(self, name: str) -> Contestant:
        model = build_model(self._config(), seed=0, attn_implementation=self.arguments.attn_implementation)
        return self._plain(name, model, is_ours=True)

    def plain_peer(self, name: str) -> Contestant:
        model = peer_model(self.config)
        model.set_experts_implementation("grouped_mm")
        return self._plain(name, model, is_ours=False)

    def _config(self) -> MoEGPTConfig:
        return MoEGPTConfig.from_dict(self.config.to_dict())

    def _engine(self, name: str, engine: Any, *, is_ours: bool) -> Contestant:
        engine.train()
        return UnderDeepSpeed(name, engine, is_ours=is_ours, accumulation=self.arguments.accumulation)

    def _plain(self, name: str, model: Any, *, is_ours: bool) -> Contestant:
        activation_checkpointing.enable(model, self.strategy.activation_checkpointing, self.settings)
        clip, rate = self.strategy.gradient_clipping, self.settings["optimizer"]["params"]["lr"]
        return Plain(name, model, clip=clip, rate=rate, is_ours=is_ours, accumulation=self.arguments.accumulation)


OURS = "ours"
#: By name; those that go without DeepSpeed know one rank only.
CONTESTANTS: dict[str, Callable[[Stage, str], Contestant]] = {
    OURS: Stage.ours,
    "stock AutoEP": Stage.stock,
    "stock AutoEP with knobs": lambda stage, name: stage.stock(name, **knobs()),
    "ours without DeepSpeed": Stage.plain_ours,
    "Glm4Moe grouped_mm without DeepSpeed": Stage.plain_peer,
}
ALONE = ("ours without DeepSpeed", "Glm4Moe grouped_mm without DeepSpeed")
