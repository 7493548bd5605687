"""Before the first step: what would go wrong in an hour, or after a night in the queue, goes wrong now and by name.

Same settings, code and library versions on all ranks; collectives that deliver the right numbers; an output folder that all
ranks see and can write to. What needs an engine is in `rehearsal.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from launch.cli import AgreedError
from launch.engine import hardware
from launch.ranks.control_group import ControlGroup
from launch.run.environment import code_hash, versions
from launch.toolchain import check_toolchain


def check(ranks: ControlGroup, output: Path, settings: dict[str, Any]) -> None:
    """Everything that needs no engine. Collective. Raises AgreedError with the rank, its host and what differs or fails."""
    ranks.run_everywhere(lambda: check_toolchain(get_accelerator().device_name()))
    kernels = os.environ.get("MOE_KERNELS", "1")  # DeepSpeed's launcher takes few variables along to other hosts
    compare(ranks, {**settings, **versions(), "this system's code": code_hash(), "MOE_KERNELS": kernels})
    own_devices(ranks, (socket.gethostname(), hardware.identity()))
    exchange(ranks)
    share_folder(ranks, output)


def compare(ranks: ControlGroup, facts: dict[str, Any]) -> None:
    """Every rank has the same facts as rank 0. Values go as hashes where they are long."""
    mine = {name: _short(value) for name, value in facts.items()}
    all_facts = ranks.gather((socket.gethostname(), mine))
    host, first = all_facts[0]
    for rank, (other_host, others) in enumerate(all_facts):
        for name in first | others:
            if others.get(name) != first.get(name):
                raise AgreedError(
                    f"the ranks differ in {name}: {first.get(name)} on rank 0 (host {host}), {others.get(name)} on rank {rank} "
                    f"(host {other_host}); start all of them with the same command, code and environment"
                )


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) < 80 else f"hash {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def own_devices(ranks: ControlGroup, mine: tuple[str, str | None]) -> None:
    """No two ranks have the same GPU, `mine`: its host and number. A rank that sees one alone takes it, as launchers that bind GPUs
    want it; so too many ranks on a host with one GPU meet only here, or before in NCCL (`ranks.join.start`)."""
    seen: dict[tuple[str, str | None], int] = {}
    for rank, device in enumerate(ranks.gather(mine)):
        if device[1] is not None and seen.setdefault(device, rank) != rank:
            raise AgreedError(f"ranks {seen[device]} and {rank} have the same GPU of host {device[0]}; start one rank a GPU")


def exchange(ranks: ControlGroup) -> None:
    """An all-reduce and an all-to-all of what AutoEP's are made of, with numbers that show who is wrong."""
    rank, size = ranks.rank, ranks.size
    device = get_accelerator().current_device_name()
    total = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(total)
    sent = torch.arange(size, device=device) + rank * size  # element i goes to rank i
    received = torch.empty_like(sent)
    if size > 1:
        dist.all_to_all_single(received, sent)
    else:
        received = sent
    good = bool((total == size * (size + 1) / 2).all()) and received.tolist() == [r * size + rank for r in range(size)]
    bad = [r for r, fine in enumerate(ranks.gather(good)) if not fine]
    if bad:
        raise AgreedError(f"the network gives wrong numbers: an all-reduce or all-to-all of ranks {bad} is not what was sent")


def share_folder(ranks: ControlGroup, output: Path) -> None:
    """Every rank can write to the run's folder, and it is the same folder for all."""
    mine = output / f".preflight_{ranks.rank}"
    token = f"{socket.gethostname()}:{output.resolve()}"

    def write() -> None:
        # Rank 0 has made it. Over NFS a host that looked before may believe for half a minute that it is not there; this asks.
        output.mkdir(parents=True, exist_ok=True)
        mine.write_bytes(os.fsencode(token))

    ranks.run_everywhere(write)
    seen = ranks.run_on_rank0(lambda: [(output / f".preflight_{r}").exists() for r in range(ranks.size)])
    ranks.run_everywhere(lambda: mine.unlink(missing_ok=True))
    if not all(seen):
        raise AgreedError(
            f"rank 0 does not see what rank {seen.index(False)} writes to {output}: --output must lie on a file system that all "
            "hosts share"
        )
