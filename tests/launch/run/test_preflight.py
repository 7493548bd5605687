"""Before the first step: the run's folder, as each host sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.cli import AgreedError
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
    """NCCL would end them, with a traceback, in the first collective."""
    ranks: Any = SimpleNamespace(gather=lambda mine: devices)
    if shared is None:
        own_devices(ranks, devices[0])
        return
    with pytest.raises(AgreedError, match=shared):
        own_devices(ranks, devices[0])
