"""Before the first step: what the ranks must have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.cli import AgreedError
from launch.run import preflight
from launch.run.preflight import own_devices, share_folder


class TwoHosts:
    """Rank 1 on a host of its own, whose disk has no run's folder yet; `share_folder` runs here as it, then as rank 0."""

    size = 2

    def __init__(self, other: Path) -> None:
        self.other = other

    def run_everywhere(self, action: Callable[[], Any]) -> None:
        action()

    def run_on_rank0(self, action: Callable[[], Any]) -> Any:
        return [True, False]  # what rank 0 sees on its own disk


def test_a_disk_that_is_not_shared_is_told_as_such(tmp_path: Path) -> None:
    """Rank 0 alone had made the folder: the others ended with the path of a file that is not there."""
    hosts: Any = TwoHosts(tmp_path)
    hosts.rank = 1
    with pytest.raises(AgreedError, match=r"rank 0 does not see what rank 1 writes to .*run: --output must lie on a file system"):
        share_folder(hosts, tmp_path / "runs" / "run")
    assert not list((tmp_path / "runs" / "run").iterdir())


@pytest.mark.parametrize(
    "devices, shared",
    [
        ([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-3"), ("b", "GPU-1")], None),
        ([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-3"), ("b", "GPU-3")], "ranks 2 and 3 have the same GPU of host b; start one"),
        ([("a", None), ("a", None)], None),
    ],
)
def test_two_ranks_on_one_gpu_are_refused(devices: list, shared: str | None) -> None:
    """Of an NCCL that has not said it while they joined (`test_join.py`)."""
    ranks: Any = SimpleNamespace(gather=lambda mine: devices)
    if shared is None:
        own_devices(ranks, devices[0])
        return
    with pytest.raises(AgreedError, match=shared):
        own_devices(ranks, devices[0])


@pytest.mark.parametrize("name", ["this system's code", "python", "torch", "MOE_KERNELS", "a setting"])
def test_ranks_that_differ_are_told_in_what(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "check_toolchain", lambda _: None)
    ranks: Any = TwoHosts(tmp_path)
    ranks.gather = lambda value: [value, ("other host", {**value[1], name: "another"})]
    with pytest.raises(AgreedError, match=rf"the ranks differ in {name}: .* another on rank 1 \(host other host\)"):
        preflight.check(ranks, tmp_path, {"a setting": 1})


def test_what_one_rank_alone_has_is_told(tmp_path: Path) -> None:
    """`--eval_tasks code=PATH`, a file of problems on one host and a folder of shards on another."""
    for mine, others in (({}, {"shards": 1}), ({"shards": 1}, {})):
        ranks: Any = SimpleNamespace(gather=lambda value, others=others: [value, ("other host", others)])
        with pytest.raises(AgreedError, match=r"the ranks differ in shards: (None|1) on rank 0"):
            preflight.compare(ranks, mine)


@pytest.mark.parametrize(("total", "received", "right"), [(3, [0, 2], True), (4, [0, 2], False), (3, [0, 1], False)])
def test_a_network_that_gives_wrong_numbers_is_told(
    total: int, received: list[int], right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rank 0 of two, which send 1 and 2 to be summed, and 0, 1 and 2, 3 to each other."""
    monkeypatch.setattr(preflight.dist, "all_reduce", lambda numbers: numbers.fill_(total))
    monkeypatch.setattr(preflight.dist, "all_to_all_single", lambda into, _: into.copy_(torch.tensor(received)))
    ranks: Any = SimpleNamespace(rank=0, size=2, gather=lambda good: [good, True])
    if right:
        preflight.exchange(ranks)
        return
    with pytest.raises(AgreedError, match=r"the network gives wrong numbers: an all-reduce or all-to-all of ranks \[0\]"):
        preflight.exchange(ranks)
