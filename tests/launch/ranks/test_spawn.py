"""A port that is free when ranks come to it, and an environment in which a process takes itself for no rank."""

from __future__ import annotations

import os
import socket

import pytest

from launch.ranks import join, spawn


def test_a_free_port_is_nobody_else_s_until_the_store_listens() -> None:
    """By mpiexec it is chosen before the imports: in the seconds until rank 0 listened others took it."""
    from torch.distributed import TCPStore

    port = spawn.free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    assert TCPStore("127.0.0.1", port, 1, is_master=True).port == port


def test_what_a_rank_starts_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables of its rank it would wait for the others, at their port."""
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
    assert join.set_environment() == (0, 1) and len(os.environ) > 1
    os.environ |= {"LOCAL_WORLD_SIZE": "1"}
    assert spawn.environment_of_no_rank() == {"PATH": "/bin"}
