"""A job for the planner's tests."""

from __future__ import annotations

from launch.planning.job import Job
from model.config_json import load_sizes


def job(model: str = "800m", **changes: object) -> Job:
    """`ep8_zero2.json` on eight GPUs, with `changes`."""
    ours: dict[str, object] = {
        "sizes": load_sizes(model),
        "ranks": 8,
        "ranks_per_node": 8,
        "sequence_length": 2048,
        "micro_batch_size": 8,
        "accumulation_steps": 4,
        "zero_stage": 2,
        "ep_size": 8,
        "activation_checkpointing": "none",
        "offloads_optimizer": False,
        "optimizer": "AdamW",
        "fused_optimizer": True,
        "weight_bytes": 2,
        "gradient_bytes": 4,
        "bucket_elements": 200_000_000,
        "overlap_comm": True,
        "live_parameters": 10**9,
        "prefetched": 50_000_000,
    }
    return Job(**{**ours, **changes})  # type: ignore[arg-type]
