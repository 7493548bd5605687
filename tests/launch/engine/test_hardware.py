"""The peak of a GPU is found by its name as the driver spells it, and a name that is not known has none."""

from __future__ import annotations

import pytest
import torch

from launch.engine import hardware


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA RTX 9999", None),
        ("Tesla V100-SXM2-32GB", None),  # no bf16 tensor cores
    ],
)
def test_peak_by_name_of_the_gpu(name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(hardware.get_accelerator(), "device_name", lambda: "cuda")
    assert hardware.peak_flops() == flops


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_without_a_product_of_bf16_is_warned_of(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    assert (hardware.bf16_hint("bfloat16") is None) == has and hardware.bf16_hint("float32") is None
    monkeypatch.setattr(hardware.get_accelerator(), "device_name", lambda: "cuda")
    assert hardware.bf16_hint("bfloat16") is None


def test_a_cpu_has_no_peak() -> None:
    assert hardware.peak_flops() is None
