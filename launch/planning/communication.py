"""What goes over which link in one optimizer step, and how long the link takes. Bytes are those one rank sends.

DeepSpeed 0.19.8: ZeRO-2 reduces at every micro-batch, ZeRO-1 at the step's end, both by all-reduce of whole buckets; after the
step the shards of the weights are gathered. ZeRO-3 gathers weights before each forward and backward and scatters gradients.
Expert parallelism exchanges rows four times a layer and micro-batch, and two times more where a block is recomputed whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.devices import Device
from launch.planning.job import Job

#: Seconds until a collective's first byte arrives: a kernel's launch and a ring's first turn; between nodes the network's besides.
START_SECONDS, NETWORK_START_SECONDS = 20e-6, 15e-6


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of communication of an optimizer step."""

    kind: str
    link: str
    bytes: float
    messages: int
    seconds: float
    hidden_by: str  # what it can go on beside: "backward" or nothing


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that communicate: `size` of them, `nodes` nodes apart, `members` of them on each node."""

    size: int
    nodes: int

    @property
    def members(self) -> int:
        return max(1, self.size // self.nodes)


def traffic(job: Job, device: Device, load: float = 1.0) -> list[Traffic]:
    """Everything one rank sends in a step. `load` is the fullest rank's share of routed rows over the even one."""
    everyone, same_experts, experts = groups(job)
    dense, routed = job.dense_parameters * job.weight_bytes, job.expert_parameters * job.weight_bytes
    rounds = {1: 1, 2: job.accumulation_steps, 3: job.accumulation_steps}.get(job.zero_stage, 1)
    passes = 3 if job.activation_checkpointing == "full" else 2
    found = [_exchange(job, device, experts, load)]
    for name, size, group in (("dense", dense, everyone), ("expert", routed, same_experts)):
        reduces = 1.0 if job.zero_stage == 3 else 2.0
        found.append(_collective(f"{name} gradients", device, group, reduces * size, rounds, job, "backward"))
        gathers = {0: 0, 1: 1, 2: 1}.get(job.zero_stage, passes * job.accumulation_steps)
        found.append(_collective(f"{name} weights", device, group, size, gathers, job, "backward" if job.zero_stage == 3 else ""))
    return [one for one in found if one.bytes]


def groups(job: Job) -> tuple[Group, Group, Group]:
    """All ranks; the ranks that hold the same experts; the ranks that share the experts out. Expert groups are neighbours, and the
    one that reaches over most nodes sets the pace."""
    nodes = -(-job.ranks // job.ranks_per_node)
    begins = range(0, job.ranks, job.ep_size)
    reached = max((n + job.ep_size - 1) // job.ranks_per_node - n // job.ranks_per_node + 1 for n in begins)
    copies = job.ranks // job.ep_size
    apart = min(nodes, copies) if job.ep_size <= job.ranks_per_node else copies
    return (
        Group(size=job.ranks, nodes=nodes),
        Group(size=copies, nodes=max(1, apart)),
        Group(size=job.ep_size, nodes=reached),
    )


def _exchange(job: Job, device: Device, group: Group, load: float) -> Traffic:
    rows = job.tokens * job.sizes.num_experts_per_tok * load
    away = rows * job.sizes.hidden_size * job.weight_bytes * (group.size - 1) / group.size
    turns = (4 + 2 * (job.activation_checkpointing == "full")) * job.sizes.num_hidden_layers * job.accumulation_steps
    # An all-to-all is not a ring: what leaves the node goes over this GPU's own share of the network.
    outside = (group.size - group.members) / max(1, group.size - 1)
    seconds = turns * (away * (1 - outside) / device.link_speed + away * outside / device.network_speed + start(group))
    return Traffic(
        kind="expert rows",
        link="network" if outside else device.link,
        bytes=away * turns,
        messages=turns if group.size > 1 else 0,
        seconds=seconds if group.size > 1 else 0.0,
        hidden_by="",
    )


def _collective(kind: str, device: Device, group: Group, size: float, times: int, job: Job, hidden_by: str) -> Traffic:
    sent = size * times * (group.size - 1) / group.size
    messages = times * max(1, round(size / max(1, job.bucket_elements * job.weight_bytes))) if sent else 0
    return Traffic(
        kind=kind,
        link=device.link if group.nodes == 1 else "network",
        bytes=sent,
        messages=messages,
        seconds=sent / ring_speed(device, group) + messages * start(group),
        hidden_by=hidden_by,
    )


def ring_speed(device: Device, group: Group) -> float:
    """Bytes a second that a rank sends in a ring: over the network the node's members drive as many rings side by side."""
    if group.nodes == 1:
        return device.link_speed
    return min(device.link_speed, group.members * device.network_speed)


def start(group: Group) -> float:
    return START_SECONDS + (NETWORK_START_SECONDS * (group.nodes - 1).bit_length() if group.nodes > 1 else 0.0)
