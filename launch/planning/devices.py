"""GPUs and the links between them, from `devices.json`, and how much of their peaks a training step reaches."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import UserError
from model.heuristics import is_loop

DATA = Path(__file__).with_name("devices.json")
#: Words of a driver's name that tell no card from another of a higher or lower peak.
UNTOLD = re.compile(r"NVIDIA|GeForce|AMD|Instinct|SXM\d?|OAM|VF|\d+GB?|HBM3e?")


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of a peak that a generation reaches, each with its source in the file: assumed, or measured by `make gpu`."""

    compute_capability: tuple[int, int] | None  # of CUDA
    matrix: float  # of bf16_tflops, products at least `narrow_below` wide
    narrow: float  # of narrower ones: k, v, experts of 512
    head: float  # the vocabulary's product
    attention: float  # a flash kernel at head dimension 64, causal FLOPs
    memory: float  # of memory_gbs, in passes that only move data
    grouped: float  # several experts in one product, beside a plain one of the same sizes
    source: str

    @property
    def lacks_grouped_mm(self) -> bool:
        """Whether PyTorch's grouped product is a loop there that waits for the device; AMD's are taken to have one."""
        return self.compute_capability is not None and is_loop(self.compute_capability[0])


@dataclass(frozen=True, kw_only=True)
class Everywhere:
    """What is taken alike for all devices; sources in the file."""

    narrow_below: int  # columns
    shortest_kernel: float  # seconds of the GPU
    host_kernel: float  # seconds of the host for one kernel
    host_step: float  # and for an optimizer step beside its kernels
    link_share: float  # of a link's bandwidth, what NCCL's collectives reach with large messages


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU. Units as in `devices.json`."""

    name: str
    names: tuple[str, ...]
    bf16_tflops: float
    memory_gib: float
    memory_gbs: float
    link: str
    link_gbs: float
    network_gbits: float
    gpus_per_node: int
    watts: float
    source: str
    efficiency: Efficiency
    everywhere: Everywhere

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return self.bf16_tflops * 1e12

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * 2**30

    @property
    def memory_speed(self) -> float:
        """Bytes a second that a pass over memory reaches."""
        return self.memory_gbs * 1e9 * self.efficiency.memory

    @property
    def link_speed(self) -> float:
        """Bytes a second and direction, inside a node."""
        return self.link_gbs * 1e9 * self.everywhere.link_share

    @property
    def network_speed(self) -> float:
        """Bytes a second and direction that one GPU's share of the network reaches."""
        return self.network_gbits / 8 * 1e9 * self.everywhere.link_share


def load_devices() -> dict[str, Device]:
    """By name, as `--gpu` takes them."""
    entries: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    del entries["about"]
    everywhere = Everywhere(**{name: one["value"] for name, one in entries.pop("everywhere").items()})
    generations = {name: _efficiency(values) for name, values in entries.pop("generations").items()}
    return {
        name: Device(
            name=name,
            efficiency=generations[values.pop("generation")],
            everywhere=everywhere,
            **{**values, "names": tuple(values["names"])},
        )
        for name, values in entries.items()
    }


def _efficiency(values: dict[str, Any]) -> Efficiency:
    capability = values["compute_capability"]
    return Efficiency(**{**values, "compute_capability": capability and tuple(capability)})


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


def device_of(driver_name: str | None) -> Device | None:
    """The card whose name's words are all in what `torch.cuda.get_device_name()` says, by the name with the most words, where the
    rest is maker, socket or memory. None on a CPU, for a card that is not in the file, and for a part or a variant of one (MIG, a
    laptop's, PCIe, D): better no figure than one over a guessed peak."""
    words = set(re.split(r"[\s_-]+", driver_name or ""))
    told = {word for word in words if not UNTOLD.fullmatch(word)}
    fitting = ((name.split(), device) for device in load_devices().values() for name in device.names)
    right = ((len(name), device) for name, device in fitting if told <= set(name) <= words)
    return max(right, key=lambda pair: pair[0], default=(0, None))[1]
