"""Joining the other ranks, however the run was started.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. `srun` and `mpiexec` have their own
names, and a plain `python launch/train.py` has none: all of them end up with the same five variables here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import resource
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from data.cli import Exit, UserError
from data.launchers import mpi_ranks
from launch.ranks.builds import compile_nothing, wait_for_builds
from launch.ranks.spawn import free_port

#: For all ranks to join: hosts of one job may start minutes apart.
JOIN_SECONDS = 600.0
#: What NCCL does when a peer fails, as torch counts its ways: abort the communicators and keep the process. By default torch ends
#: the process in C++ (exit code 134), before it can say whom the run ends for.
CLEAN_UP_ONLY = "2"
#: A rank on one host takes some 50: PyTorch's store and gloo, logs, shards, the files of a save.
LEAST_OPEN_FILES = 64
#: Enough for any job; where a container's hard limit is 2^30, programs that a rank starts may walk through all of them.
MOST_OPEN_FILES = 1 << 16
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS")


def raise_open_files() -> None:
    """As many open files as this process may have, within reason: peers, shards and logs take one each.

    The soft limit is for programs that use `select`; this one may go to the hard limit by itself. Raises UserError for too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft < LEAST_OPEN_FILES:
        raise UserError(f"this process may open {soft} files and needs {LEAST_OPEN_FILES}; raise the limit (ulimit -n)")


def set_environment() -> tuple[int, int]:
    """Fill in the five variables; returns (rank, world size). Raises UserError for some that no launcher sets so."""
    env = os.environ
    if "RANK" not in env and _is_srun_s(env):
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
        if "MASTER_ADDR" not in env:
            raise UserError("under srun MASTER_ADDR must be set; launch/templates/slurm.sh shows how")
    elif "RANK" not in env and mpi_ranks(env) > 1:
        _environment_from_mpi()
    _check_numbers(env)
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(free_port() if env["WORLD_SIZE"] == "1" else 29500)
    return int(env["RANK"]), int(env["WORLD_SIZE"])


def _check_numbers(env: Mapping[str, str]) -> None:
    """A WORLD_SIZE that was left in the shell would have this process wait for ranks that nobody starts."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not env.get(name, "0").strip().isdecimal():
            raise UserError(
                f"{name} in the environment is {env[name]!r} and must be a whole number of at least 0; unset it, or let a launcher "
                "set it"
            )
    if "RANK" not in env and int(env.get("WORLD_SIZE", "1")) != 1:
        raise UserError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} in the environment and RANK is not set: no launcher started this rank; unset "
            "WORLD_SIZE, or start with deepspeed or torchrun"
        )
    rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    if rank >= size:
        raise UserError(
            f"RANK is {rank} in the environment and WORLD_SIZE {size}: ranks count from 0 to one less; unset both, or start with "
            "deepspeed or torchrun"
        )


def _is_srun_s(env: Mapping[str, str]) -> bool:
    """Whether srun started this rank itself.

    What mpiexec starts within a job inherits the variables of the batch script, or of the one task a host by which MPICH's mpiexec
    reaches it: every rank would be the same. `srun --mpi=pmi2` sets PMI's as well, to what its own say.
    """
    own, pmi = (tuple(env.get(name) for name in names) for names in (SLURM_VARIABLES, ("PMI_RANK", "PMI_SIZE")))
    if None in own or int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"])) < 2:
        return False
    if pmi == own and "MASTER_ADDR" not in env:
        return False  # mpiexec's, with one rank a host: MPI knows where rank 0 is
    return not {"OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & set(env) and pmi in (own, (None, None))


def _environment_from_mpi() -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    started = mpi_ranks(os.environ)
    if world.size != started:  # each rank would train by itself
        raise UserError(
            f"the launcher started {started} ranks and MPI sees {world.size}: mpi4py was built for another MPI, or srun's PMI is "
            "not its; set MASTER_ADDR under srun (launch/templates/slurm.sh shows how), or use that MPI's own mpiexec"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    on_one_host = world.allreduce(local.size == world.size, MPI.LAND)
    address = ("127.0.0.1" if on_one_host else own_address(), free_port()) if world.rank == 0 else None
    host, port = world.bcast(address)
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(local.rank))
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))


def own_address() -> str:
    """Of this host, for others. Debian's and Ubuntu's /etc/hosts give a host's own name a loopback address: then the name.
    Also where it has none: the others may know it, and MASTER_ADDR goes before all this."""
    name = socket.gethostname()
    try:
        found = str(socket.getaddrinfo(name, None)[0][4][0])
    except socket.gaierror:
        return name
    return name if ipaddress.ip_address(found.partition("%")[0]).is_loopback else found


def check_restart() -> None:
    """Raises UserError for ranks that torchrun has started again around the store of those before them: they would wait for
    addresses at which nobody listens any more (pytorch issue 135712)."""
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        raise UserError(
            "torchrun has started the ranks again with the store of those before them, in which they cannot find each other; "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, as launch/templates/torchrun.sh does"
        )


def start(timeout: float, backend: str | None = None) -> None:
    """Join the process group, by default with NCCL on GPUs and gloo elsewhere. `timeout` seconds bound every collective.

    DeepSpeed names the device, and so torch has NCCL connect here: two ranks on one GPU end in that.
    """
    import deepspeed
    import torch
    from torch.distributed import DistBackendError, DistNetworkError
    from torch.utils.cpp_extension import get_default_build_root

    from launch.toolchain import trains_on_gpu

    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", CLEAN_UP_ONLY)
    if trains_on_gpu():
        device = device_index(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(device)  # DeepSpeed takes its device by it, and refuses another one of Open MPI's
        if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
            os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device)
        torch.cuda.set_device(device)
    check_restart()
    wait_for_builds(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
    compile_nothing()
    try:
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        bound_later_groups(timedelta(seconds=timeout))
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} is in use, by another run on this host perhaps; choose one, as in "
            "deepspeed --master_port 29501 ..."
        ) from None
    except DistBackendError as error:
        if not (same := re.search(r"Duplicate GPU detected[\s:]*(rank \d+ and rank \d+)?", str(error))):
            raise
        raise UserError(
            f"{same[1] or 'two ranks'} have the same GPU of host {socket.gethostname()}; start one rank a GPU"
        ) from None


def bound_later_groups(timeout: timedelta) -> None:
    """Give the groups that DeepSpeed makes, over which nearly all of a step's collectives go, this timeout as well.

    It makes them without one, and torch then takes ten minutes for NCCL and half an hour for gloo: a rank that waits longer for a
    disk would end the run there, before the watchdog and without a name.
    """
    import torch.distributed as dist
    from deepspeed.comm.torch import TorchBackend

    TorchBackend.new_group = lambda _, ranks: dist.new_group(ranks, timeout=timeout)


def device_index(local_rank: int, visible: int) -> int:
    """The GPU of a rank among those that it sees; a launcher that binds them (Slurm's --gpus-per-task) shows it one alone."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(f"local rank {local_rank} has no GPU of its own: {visible} are visible; start one rank a GPU")
    return local_rank


@contextlib.contextmanager
def joining_within(seconds: float) -> Iterator[None]:
    """End this process if joining the others takes longer. Before the watchdog runs nobody else can tell: a rank that joins waits
    for minutes, some of them again and again, for a rank 0 that has died or was never started."""

    def give_up() -> None:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(
            f"error: rank {os.environ['RANK']} has waited {seconds:.0f} s for all ranks to join (rank 0 is to be at {place}); "
            "look for the one that has died or was never started, and between hosts at a firewall or the wrong network device "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(Exit.STALLED)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
