"""GPUs and the links between them, from `devices.json`, and how much of their peaks a training step reaches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import UserError

DATA = Path(__file__).with_name("devices.json")


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of a peak that are reached. Assumptions: see `EFFICIENCIES`."""

    matrix: float  # of bf16_tflops, matrix products at least 1,024 wide
    narrow: float  # narrower ones: k, v, experts of 512
    head: float  # the vocabulary's product
    attention: float  # a flash kernel at head dimension 64, causal FLOPs
    memory: float = 0.85  # of memory_gbs, in passes that only move data


#: Modelled, not measured here. Ampere and Hopper: rates of cuBLAS, grouped_mm and FlashAttention 2 and 3 at this model's sizes
#: as published (VeOmni PR 460 and Liger-Kernel's benchmark data for grouped products, flash-attention's README for attention);
#: H100 and H200 are held by their power limit. Blackwell takes Hopper's shares and consumer cards Ampere's, for want of figures.
EFFICIENCIES = {
    "ampere": Efficiency(matrix=0.76, narrow=0.68, head=0.78, attention=0.48),
    "hopper": Efficiency(matrix=0.63, narrow=0.50, head=0.66, attention=0.33),
    "blackwell": Efficiency(matrix=0.60, narrow=0.45, head=0.62, attention=0.30),
    "cdna3": Efficiency(matrix=0.45, narrow=0.35, head=0.50, attention=0.20),
    "ada": Efficiency(matrix=0.76, narrow=0.68, head=0.78, attention=0.48),
    "blackwell-consumer": Efficiency(matrix=0.76, narrow=0.68, head=0.78, attention=0.48),
}
#: Of a link's bandwidth, what NCCL's collectives reach with large messages (nccl-tests reports 230 of 300 GB/s on a DGX A100).
LINK_SHARE = 0.77


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU. Units as in `devices.json`."""

    name: str
    names: tuple[str, ...]
    generation: str
    bf16_tflops: float
    memory_gib: float
    memory_gbs: float
    link: str
    link_gbs: float
    network_gbits: float
    gpus_per_node: int
    watts: float
    source: str

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return self.bf16_tflops * 1e12

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * 2**30

    @property
    def efficiency(self) -> Efficiency:
        return EFFICIENCIES[self.generation]

    @property
    def memory_speed(self) -> float:
        """Bytes a second that a pass over memory reaches."""
        return self.memory_gbs * 1e9 * self.efficiency.memory

    @property
    def link_speed(self) -> float:
        """Bytes a second and direction, inside a node."""
        return self.link_gbs * 1e9 * LINK_SHARE

    @property
    def network_speed(self) -> float:
        """Bytes a second and direction that one GPU's share of the network reaches."""
        return self.network_gbits / 8 * 1e9 * LINK_SHARE


def load_devices() -> dict[str, Device]:
    """By name, as `--gpu` takes them."""
    entries: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    entries.pop("about")
    return {name: Device(name=name, **{**values, "names": tuple(values["names"])}) for name, values in entries.items()}


def find_device(name: str) -> Device:
    """By `--gpu`'s name, in any case, or by the driver's name for the card. Raises `UserError` with the names there are."""
    devices = load_devices()
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in devices:
        return devices[wanted]
    known = device_of(name)
    if known is None:
        raise UserError(f"--gpu {name} is not known; known are {', '.join(devices)}")
    return known


def device_of(driver_name: str) -> Device | None:
    """The card that `torch.cuda.get_device_name()` names so; None where it is not in the file."""
    return next((d for d in load_devices().values() if any(part in driver_name for part in d.names)), None)
