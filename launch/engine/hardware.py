"""What a device has and can do. Of a GPU at most, by its vendor's data sheet,
which is the denominator of the model FLOP utilisation (MFU)."""

from __future__ import annotations

import os
import re

import torch
from deepspeed.accelerator import get_accelerator

#: Dense bf16 tensor-core peak in FLOP/s with fp32 accumulation, from NVIDIA's data sheets (half of the figure "with sparsity").
#: A key is the words that a device's name must have; of several that fit, the one with the most words counts. A device that is
#: not here has no MFU: better no figure than one over a guessed peak.
PEAK_BF16_FLOPS: dict[tuple[str, ...], float] = {
    ("A100",): 312e12,  # SXM and PCIe, 40 and 80 GB
    ("A800",): 312e12,  # A100 with less NVLink
    ("A40",): 149.7e12,
    ("A10",): 125e12,
    ("A10G",): 70e12,  # AWS's A10, by AWS; NVIDIA publishes none
    ("L4",): 121e12,
    ("L40",): 181e12,
    ("L40S",): 362e12,
    ("4090",): 165.2e12,
    ("H100",): 989e12,  # SXM
    ("H100", "PCIe"): 756e12,
    ("H100", "NVL"): 835e12,
    ("H800",): 989e12,  # H100 SXM with less NVLink
    ("H20",): 148e12,
    ("H200",): 989e12,
    ("H200", "NVL"): 835e12,
    ("GH200",): 989e12,
    ("B200",): 2250e12,
    ("GB200",): 2500e12,
}


def peak_bf16_flops(device_name: str) -> float | None:
    """Of one device, by the words of its name (`NVIDIA A100-SXM4-80GB`); None where the table does not know it."""
    words = set(re.split(r"[\s_-]+", device_name))
    known = [key for key in PEAK_BF16_FLOPS if words.issuperset(key)]
    return PEAK_BF16_FLOPS[max(known, key=len)] if known else None


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


def peak_flops() -> float | None:
    """The peak of this process's device in FLOP/s; None on a CPU and where it is not known."""
    if get_accelerator().device_name() != "cuda":
        return None
    return peak_bf16_flops(torch.cuda.get_device_name())
