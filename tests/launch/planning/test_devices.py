"""The data of devices.json, and that a card is found by its name as the driver spells it."""

from __future__ import annotations

import json

import pytest

from data.cli import UserError
from launch.planning.devices import DATA, device_of, find_device, load_devices

ASKED_FOR = ("a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200", "mi300x", "l40s", "rtx-4090", "rtx-5090")


def test_every_card_that_was_asked_for_with_its_source() -> None:
    devices = load_devices()
    assert set(ASKED_FOR) <= set(devices)
    for device in devices.values():
        assert device.source and device.names
        assert min(device.bf16_tflops, device.memory_gib, device.memory_gbs, device.link_gbs, device.network_gbits) > 0
    # Facts that a slip of a factor of two (sparsity, both directions) would break.
    assert devices["h100-80gb"].bf16_tflops / devices["a100-80gb"].bf16_tflops == pytest.approx(3.17, abs=0.01)
    assert devices["h200"].memory_gbs > devices["h100-80gb"].memory_gbs > devices["a100-80gb"].memory_gbs
    assert 2 * devices["a100-80gb"].link_gbs == 600 and 2 * devices["h200"].link_gbs == 900
    assert 2 * devices["a800"].link_gbs == 2 * devices["h800"].link_gbs == 400


def test_every_share_and_cost_says_where_it_is_from() -> None:
    """A source, or that it is assumed, or that `make gpu` has measured it; and no share is more than all."""
    entries = json.loads(DATA.read_text(encoding="utf-8"))
    said = [one["source"] for one in (*entries["generations"].values(), *entries["everywhere"].values())]
    assert all(text.startswith(("assumed", "measured by make gpu")) or "nccl-tests" in text for text in said)
    for device in load_devices().values():
        reached = device.efficiency
        shares = (reached.matrix, reached.narrow, reached.head, reached.attention, reached.memory, reached.grouped)
        assert min(shares) > 0 and max(shares) < 1


@pytest.mark.parametrize(
    ("driver_name", "name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", 312e12),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312e12),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie", 312e12),
        ("NVIDIA A100-SXM-64GB", "a100-40gb", 312e12),  # the peak is right, memory is not overstated
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie", 312e12),
        ("NVIDIA A100-PCIE-80GB", "a100-80gb-pcie", 312e12),
        ("NVIDIA A800-SXM4-80GB", "a800", 312e12),
        ("NVIDIA A800 80GB PCIe", "a800-pcie", 312e12),
        ("NVIDIA H800", "h800", 989e12),
        ("NVIDIA A40", "a40", 149.7e12),
        ("NVIDIA A10", "a10", 125e12),
        ("NVIDIA A10G", "a10g", 70e12),
        ("NVIDIA H100 80GB HBM3", "h100-80gb", 989e12),
        ("NVIDIA H100 PCIe", "h100-pcie", 756e12),
        ("NVIDIA H100 NVL", "h100-nvl", 835e12),
        ("NVIDIA H20", "h20", 148e12),
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA H200 NVL", "h200-nvl", 835e12),
        ("NVIDIA GH200 480GB", "gh200", 989e12),
        ("NVIDIA B200", "b200", 2250e12),
        ("NVIDIA GB200", "gb200", 2500e12),
        ("NVIDIA L4", "l4", 121e12),
        ("NVIDIA L40", "l40", 181e12),
        ("NVIDIA L40S", "l40s", 362e12),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 165.2e12),
        ("AMD Instinct MI300X", "mi300x", 1307e12),
    ],
)
def test_the_drivers_names(driver_name: str, name: str, peak: float) -> None:
    """The peak is the denominator of training's MFU as well as of the plan's."""
    found = device_of(driver_name)
    assert found is not None and found.name == name and found.peak == pytest.approx(peak)
    assert find_device(driver_name) == find_device(name.upper().replace("-", "_")) == found
    if "PCIE" in driver_name.upper():  # a board's link is half of what a plan says of its speed
        assert found.link.startswith("PCIe") and found.link_gbs <= 64


@pytest.mark.parametrize(
    "driver_name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "GRID A100-40C",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H800 PCIe",
        "NVIDIA A800 40GB Active",
        "NVIDIA H20-3e",
    ],
)
def test_a_part_or_a_variant_of_a_card_is_not_the_card(driver_name: str) -> None:
    """Each has another peak than the card whose words its name has."""
    assert device_of(driver_name) is None


def test_an_unknown_card_is_refused_with_the_known_ones() -> None:
    for name in ("NVIDIA GeForce GTX 1080", "Tesla V100-SXM2-32GB", "NVIDIA RTX 9999", None):
        assert device_of(name) is None
    with pytest.raises(
        UserError,
        match="--gpu v100 is not known; known are a100-40gb, a100-80gb, a100-40gb-pcie, a100-80gb-pcie, a800, a800-pcie, a40",
    ):
        find_device("v100")
