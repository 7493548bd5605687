"""A training job as the planner sees it: the model's sizes, the ranks, and what of the DeepSpeed JSON costs memory or time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.engine.strategy import Strategy, is_muon
from launch.nested import lookup
from model.accounting import count_parameters
from model.sizes import ModelSizes

#: Numbers that an optimizer keeps beside a master weight; of one that is not here as many as Adam's two.
MOMENTS = {"lion": 1, "adagrad": 1, "sgd": 0}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's share of the work. Bytes are of one element."""

    sizes: ModelSizes
    ranks: int
    ranks_per_node: int
    sequence_length: int
    micro_batch_size: int  # sequences a rank takes through the model at once
    accumulation_steps: int  # micro-batches of an optimizer step
    zero_stage: int
    ep_size: int  # ranks that share one copy of the experts
    activation_checkpointing: str  # none, selective, full
    offloads_optimizer: bool
    optimizer: str
    fused_optimizer: bool
    weight_bytes: int
    gradient_bytes: int  # of what gradients are summed in
    bucket_elements: int
    overlap_comm: bool
    live_parameters: int  # ZeRO-3: elements that may be gathered at a time
    prefetched: int  # ZeRO-3: elements of one gathering ahead
    moments: int = 2  # numbers that the optimizer keeps beside a master weight, of Muon those of its AdamW
    moment_bytes: int = 4
    master_bytes: int = 4
    compiles: bool = False  # each block's attention and norms, which ZeRO-3 does not go with

    @property
    def buckets(self) -> int:
        """ZeRO 1 and 2 fill one while another is reduced."""
        return 2 if self.overlap_comm and self.zero_stage < 3 else 1

    @property
    def is_muon(self) -> bool:
        return is_muon(self.optimizer)

    @property
    def tokens(self) -> int:
        """Of one micro-batch on one rank."""
        return self.micro_batch_size * self.sequence_length

    @property
    def global_batch(self) -> int:
        return self.micro_batch_size * self.accumulation_steps * self.ranks

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence_length

    @property
    def dense_parameters(self) -> int:
        """Every rank holds them (before ZeRO divides anything)."""
        count = count_parameters(self.sizes)
        return count.total - count.routed_experts

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding and of the head, which may be one."""
        sizes = self.sizes
        return sizes.vocab_size * sizes.hidden_size * (1 if sizes.tie_word_embeddings else 2)

    @property
    def expert_parameters(self) -> int:
        """Of the experts that live on this rank."""
        return count_parameters(self.sizes).routed_experts // self.ep_size

    @property
    def local_parameters(self) -> int:
        return self.dense_parameters + self.expert_parameters

    @property
    def shard(self) -> float:
        """Parameters of which this rank has the optimizer state: without ZeRO all that it holds, else experts are shared out among
        the ranks that hold the same ones only."""
        if self.zero_stage == 0:
            return self.local_parameters
        return self.dense_parameters / self.ranks + self.expert_parameters * self.ep_size / self.ranks


def micro_batches(share: int, most: int) -> list[int]:
    """Sizes of a micro-batch, rising, that a rank's share of the global batch can be cut into."""
    return [n for n in range(1, min(share, most) + 1) if share % n == 0]


def job_from(
    sizes: ModelSizes,
    config: dict[str, Any],
    *,
    ranks: int,
    ranks_per_node: int,
    sequence_length: int,
) -> Job:
    """From a resolved DeepSpeed JSON (`strategy.resolve_config`)."""
    strategy, zero = Strategy.of(config), lookup(config, "zero_optimization", {})
    weight_bytes = 4 if strategy.dtype == "float32" else 2
    return Job(
        sizes=sizes,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        sequence_length=sequence_length,
        micro_batch_size=strategy.micro_batch_size,
        accumulation_steps=strategy.accumulation_steps,
        zero_stage=strategy.zero_stage,
        ep_size=strategy.ep_size,
        activation_checkpointing=strategy.activation_checkpointing,
        offloads_optimizer=strategy.offloads_optimizer,
        optimizer=strategy.optimizer,
        fused_optimizer=bool(lookup(config, "optimizer.params.fused", False)),
        weight_bytes=weight_bytes,
        gradient_bytes=4 if strategy.gradient_dtype == "float32" else 2,
        # DeepSpeed's own defaults where the JSON is silent (deepspeed/runtime/zero/config.py, 0.19.8)
        bucket_elements=int(zero.get("reduce_bucket_size", 500_000_000)),
        overlap_comm=bool(zero.get("overlap_comm", False)),
        live_parameters=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
        prefetched=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        moments=_moments(strategy.optimizer.lower(), config),
        moment_bytes=2 if lookup(config, "bf16.bf16_optimizer_states", False) else 4,
        master_bytes=2 if any(lookup(config, f"{one}.{one}_master_weights_and_grads", False) for one in ("bf16", "fp16")) else 4,
        compiles=strategy.compiles,
    )


def _moments(optimizer: str, config: dict[str, Any]) -> int:
    more = lookup(config, "optimizer.params.momentum" if optimizer == "sgd" else "optimizer.params.amsgrad", False)
    return MOMENTS.get(optimizer, 2) + bool(more)
