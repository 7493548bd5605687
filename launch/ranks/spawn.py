"""What whoever starts processes gives them: to ranks a port at which they meet, to others an environment that makes them none."""

from __future__ import annotations

import os
import socket

#: By which launchers say what a rank is.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Bound and never listened on: until this process ends the kernel gives their ports to nobody who asks for any.
_kept: list[socket.socket] = []


def free_port() -> int:
    """A port that stays free for whoever listens on it with SO_REUSEADDR, as PyTorch's store does, and be it seconds from now."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("", 0))
    _kept.append(kept)
    return int(kept.getsockname()[1])


def environment_of_no_rank() -> dict[str, str]:
    """For a process that a rank starts and that is none itself."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
