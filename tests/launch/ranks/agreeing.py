"""One rank for test_control_group.py: `agreeing.py CASE`, run by the nursery; prints what it got."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from data.cli import UserError
from launch.cli import AgreedError, RankFailedError, run_command
from launch.ranks.control_group import ControlGroup


def on_rank(rank: int, error: Exception) -> Callable[[], str]:
    def action() -> str:
        if dist.get_rank() == rank:
            raise error
        return f"result of rank {dist.get_rank()}"

    return action


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("has a lock")
        self.lock = threading.Lock()


CASES: dict[str, Callable[[ControlGroup], Any]] = {
    "results": lambda ranks: (ranks.run_everywhere(ranks.rank.__str__), ranks.run_on_rank0(lambda: f"by {ranks.rank}")),
    "mistake": lambda ranks: ranks.run_everywhere(on_rank(1, UserError("no such thing"))),
    "disk": lambda ranks: ranks.run_everywhere(on_rank(1, OSError(errno.ENOSPC, "No space left on device", "/d/f"))),
    "mistake of rank 0": lambda ranks: ranks.run_on_rank0(on_rank(0, UserError("nothing there"))),
    "fault": lambda ranks: ranks.run_everywhere(on_rank(1, KeyError("weights"))),
    "assertion of rank 0": lambda ranks: ranks.run_on_rank0(on_rank(0, AssertionError())),
    "value": lambda ranks: ranks.run_everywhere(on_rank(0, ValueError("not a user's"))),
    "unpicklable": lambda ranks: ranks.run_everywhere(on_rank(1, Unpicklable())),
}


def main() -> int:
    dist.init_process_group("gloo")
    ranks = ControlGroup()
    try:
        print(f"rank {ranks.rank} got {CASES[sys.argv[1]](ranks)}", flush=True)
    except (AgreedError, RankFailedError) as error:
        print(f"rank {ranks.rank} raised {type(error).__name__}: {error}", flush=True)
        ranks.gather(None)
        raise
    except Exception:
        ranks.gather(None)  # neither leaves before both have spoken
        raise
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    run_command(main)
