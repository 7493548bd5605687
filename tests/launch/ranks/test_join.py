"""How a rank learns who it is, whatever started it."""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.cli import Exit, UserError
from data.launchers import MPI_SIZES
from launch.ranks import join
from launch.ranks.join import device_index, set_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
NAMES += ("SLURM_STEP_NUM_TASKS", "PMI_RANK", "OMPI_COMM_WORLD_RANK", *MPI_SIZES)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "x")  # so that what the function sets is taken back as well
        monkeypatch.delenv(name)


def test_a_plain_start_is_one_rank() -> None:
    assert set_environment() == (0, 1)


def test_an_empty_size_of_a_launcher_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "")
    assert set_environment() == (0, 1)


def test_a_rank_beyond_the_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited ten minutes for a rank 0 that is nowhere; spaces around a number are none of it."""
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK is 3 in the environment and WORLD_SIZE 1: ranks count from 0"):
        set_environment()
    monkeypatch.setenv("WORLD_SIZE", " 4")
    assert set_environment() == (3, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UserError, match="RANK is 4 in the environment and WORLD_SIZE 4"):
        set_environment()


def test_a_world_size_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left in the shell, it would have the run wait ten minutes for ranks that nobody starts."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="WORLD_SIZE is 8 in the environment and RANK is not set: no launcher started this rank"):
        set_environment()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert set_environment() == (0, 1)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "two", "-1", "1.5"])
def test_no_whole_number_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for one, usual in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), (name, value)):
        monkeypatch.setenv(one, usual)
    with pytest.raises(UserError, match=f"^{name} in the environment is '{value}' and must be a whole number"):
        set_environment()


def test_slurm_s_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_NTASKS", "16"), ("SLURM_PROCID", "9"), ("SLURM_LOCALID", "1"), ("MASTER_ADDR", "node1")):
        monkeypatch.setenv(name, value)
    assert set_environment() == (9, 16)


def test_srun_with_pmi2_is_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1"}
    for name, value in {**slurm, "PMI_RANK": "3", "PMI_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert set_environment() == (3, 4)


def slurm(tasks: int, step: int, rank: int) -> dict[str, str]:
    return {"SLURM_NTASKS": str(tasks), "SLURM_STEP_NUM_TASKS": str(step), "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}


PMI, OPEN_MPI = {"PMI_RANK": "2", "PMI_SIZE": "4"}, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}


@pytest.mark.parametrize(
    "environment",
    [
        *({**slurm(2, 1, 0), **own, "MASTER_ADDR": "node1"} for own in (PMI, OPEN_MPI)),  # those of the batch script
        *({**slurm(2, 2, 1), **own, "MASTER_ADDR": "node1"} for own in (PMI, OPEN_MPI)),  # of the task a host that it starts
        {**slurm(2, 2, 1), "PMI_RANK": "1", "PMI_SIZE": "2"},  # with one rank a host they are the ranks': MPI has the address
    ],
)
def test_mpiexec_within_a_job_of_slurm(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read off Slurm 22.05 with MPICH: each rank was taken for the one whose variables it had inherited."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[str] = []
    monkeypatch.setattr(join, "_environment_from_mpi", lambda: asked.append("mpi"))
    set_environment()
    assert asked == ["mpi"]


def test_python_in_a_batch_script_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert set_environment() == (0, 1)


def test_slurm_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_NTASKS", "2"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_ADDR must be set; launch/templates/slurm\.sh"):
        set_environment()


@pytest.mark.parametrize("local, visible, device", [(0, 1, 0), (5, 1, 0), (0, 8, 0), (7, 8, 7)])
def test_the_gpu_of_a_rank(local: int, visible: int, device: int) -> None:
    assert device_index(local, visible) == device


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="local rank 4 has no GPU of its own: 4 are visible"):
        device_index(4, 4)


def test_a_port_that_is_in_use_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is torch's own, made as its process group makes it: what it raises is what is recognised."""
    import deepspeed
    from torch.distributed import TCPStore

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: TCPStore("127.0.0.1", port, 2, is_master=True))
        monkeypatch.setattr(join, "compile_nothing", lambda: None)
        monkeypatch.setattr(join, "wait_for_builds", lambda _: None)
        monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")  # so that it is put back
        with pytest.raises(UserError, match=f"port {port} is in use, by another run on this host perhaps"):
            join.start(10)


@pytest.mark.parametrize(
    "store, count, refused", [("True", "1", True), ("True", "0", False), ("False", "2", False), (None, None, False)]
)
def test_ranks_that_torchrun_started_again_need_a_store_of_their_own(
    store: str | None, count: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", store), ("TORCHELASTIC_RESTART_COUNT", count)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    if not refused:
        join.check_restart()
        return
    with pytest.raises(UserError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        join.check_restart()


def test_every_group_of_deepspeed_waits_as_long_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it gives its groups no timeout: ten minutes under NCCL, whatever --stall_timeout says."""
    import torch.distributed as dist
    from deepspeed.comm.torch import TorchBackend

    asked: list[timedelta] = []
    monkeypatch.setattr(TorchBackend, "new_group", TorchBackend.new_group)  # so that it is put back
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout=None: asked.append(timeout))
    monkeypatch.setattr("deepspeed.init_distributed", lambda **_: None)
    monkeypatch.setattr(join, "wait_for_builds", lambda _: None)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}.items():
        monkeypatch.setenv(name, value)
    join.start(77)
    TorchBackend.__new__(TorchBackend).new_group([0, 1])
    assert asked == [timedelta(seconds=77)]


@pytest.mark.parametrize("seconds", [-1000, 1000])
def test_a_killed_builder_s_lock_is_removed_where_torch_builds(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In TORCH_EXTENSIONS_DIR where it is set, and with a time that has not come yet."""
    lock = tmp_path / "ragged_ops" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() + seconds,) * 2)
    monkeypatch.setattr("deepspeed.init_distributed", lambda **_: None)
    monkeypatch.setattr(join, "bound_later_groups", lambda _: None)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    join.start(10)
    assert not lock.exists() and capfd.readouterr().err.startswith(f"removing {lock}: ")


@pytest.mark.parametrize(
    "found, address",
    [("10.0.0.7", "10.0.0.7"), ("127.0.1.1", "node7"), ("fd00::7", "fd00::7"), ("::1", "node7"), (None, "node7")],
)
def test_other_hosts_are_given_no_loopback_address(found: str | None, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's /etc/hosts has `127.0.1.1 node7`: by mpiexec, the ranks of other hosts looked for rank 0 on their own."""
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")

    def look_up(*_: object) -> list:
        if found is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert join.own_address() == address


def test_ranks_that_mpi_does_not_join_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another MPI's mpiexec, or srun's PMI: mpi4py sees each rank alone, and each would have trained a model of its own."""
    for name, value in {"PMI_RANK": "0", "PMI_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1))))
    with pytest.raises(UserError, match="the launcher started 2 ranks and MPI sees 1"):
        set_environment()


def test_who_has_joined_is_not_ended_and_who_waits_too_long_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", ended.put)
    for name, value in {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with join.joining_within(12345.0):
        (timer,) = (t for t in threading.enumerate() if isinstance(t, threading.Timer) and t.interval == 12345.0)
    assert timer.finished.is_set()
    with join.joining_within(0.01):
        assert ended.get(timeout=60) == Exit.STALLED
