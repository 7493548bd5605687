"""What this process computes on."""

from __future__ import annotations

import os

import torch

from launch.toolchain import cpu_multiplies_bf16, trains_on_gpu


def identity() -> str | None:
    """What tells this process's GPU from all others; None on a CPU."""
    if not trains_on_gpu():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def memory() -> int:
    """Bytes of this process's GPU, or of the host where it trains on the CPU: all there are, free or not."""
    if trains_on_gpu():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bf16_hint(dtype: str) -> str | None:
    """What a user should know who trains in bf16 on a CPU without instructions for it."""
    if dtype != "bfloat16" or trains_on_gpu() or cpu_multiplies_bf16():
        return None
    return (
        "warning: this CPU has no instructions for products of bf16 (AVX512_BF16): a step takes some three to ten times as long as "
        "in fp32, which ds_configs/cpu_ep1_zero2_fp32.json (two ranks: cpu_ep2_zero2_fp32.json) trains in"
    )


def gpu_name() -> str | None:
    """Of this process's GPU, as its driver spells it (`NVIDIA A100-SXM4-80GB`); None on a CPU."""
    return torch.cuda.get_device_name() if trains_on_gpu() else None
