"""The GPU of a process is known by its name, as the driver spells it."""

from __future__ import annotations

import pytest
import torch

from launch.engine import hardware


def test_the_name_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.gpu_name() is None  # a CPU
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(hardware, "trains_on_gpu", lambda: True)
    assert hardware.gpu_name() == "NVIDIA H200"


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_without_a_product_of_bf16_is_warned_of(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: has)
    assert (hardware.bf16_hint("bfloat16") is None) == has and hardware.bf16_hint("float32") is None
    monkeypatch.setattr(hardware, "trains_on_gpu", lambda: True)
    assert hardware.bf16_hint("bfloat16") is None
