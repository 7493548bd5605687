"""What this process computes on."""

from __future__ import annotations

import os

import torch
from deepspeed.accelerator import get_accelerator


def identity() -> str | None:
    """What tells this process's GPU from all others; None on a CPU."""
    if get_accelerator().device_name() != "cuda":
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def memory() -> int:
    """Bytes of this process's GPU, or of the host where it trains on the CPU: all there are, free or not."""
    if get_accelerator().device_name() == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bf16_hint(dtype: str) -> str | None:
    """What a user should know who trains in bf16 on a CPU for which oneDNN has no such product."""
    if dtype != "bfloat16" or get_accelerator().device_name() != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "warning: PyTorch has no product of bf16 for this CPU (it lacks AVX-512) and multiplies number by number, some ten times "
        "as slowly as in fp32; leave bf16 out of the JSON here"
    )


def gpu_name() -> str | None:
    """Of this process's GPU, as its driver spells it (`NVIDIA A100-SXM4-80GB`); None on a CPU."""
    return torch.cuda.get_device_name() if get_accelerator().device_name() == "cuda" else None
