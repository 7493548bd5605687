"""The same job over MPI ranks: `mpiexec -n N python data/preprocess.py ...`. Rank 0 reads and writes, the others are its workers.

Only rank 0 touches files, so the other hosts need no shared file system; blocks of text go out and tokens come back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data.pool import InOrder, Team, in_order, start_worker
from data.work import WorkOptions

#: Set by MPICH and Intel MPI (Hydra), Open MPI, and Slurm's PMI; looked at before MPI itself is loaded.
LAUNCHER_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "PMIX_RANK")


def world() -> Any:
    """MPI's communicator if we were started as one of several ranks, else None."""
    if not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return None
    os.environ.setdefault("MPI4PY_FUTURES_BACKOFF", "0.001")  # seconds; idle ranks sleep instead of spinning
    from mpi4py import MPI

    return MPI.COMM_WORLD if MPI.COMM_WORLD.Get_size() > 1 else None


class MpiTeam(Team):
    """Rank 0's side. The other ranks wait in `serve` for the options, then work until the executor closes."""

    def __init__(self, comm: Any) -> None:
        super().__init__(comm.Get_size() - 1)
        self.comm = comm
        self.started = False

    @contextmanager
    def start(self, options: WorkOptions) -> Iterator[InOrder]:
        from mpi4py.futures import MPICommExecutor

        self.started = True
        self.comm.bcast(options, root=0)
        with MPICommExecutor(self.comm, root=0) as pool:
            # None on the other ranks only; it has the interface of a concurrent.futures.Executor without being one.
            executor: Any = pool
            yield lambda blocks: in_order(blocks, executor, self.workers)


def serve(comm: Any) -> int:
    """A worker rank's whole life. Returns rank 0's exit code."""
    from mpi4py.futures import MPICommExecutor

    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    options = comm.bcast(None, root=0)
    if options is not None:
        try:
            start_worker(options)
        except Exception as error:
            # Rank 0 would wait for ever for a worker that never started.
            print(f"error on rank {comm.Get_rank()}: {error}", file=sys.stderr, flush=True)
            comm.Abort(1)
        with MPICommExecutor(comm, root=0):
            pass
    return comm.bcast(None, root=0)


def lead(comm: Any, job: Callable[[Team], int]) -> int:
    """Rank 0: do the job; whatever happens, the other ranks hear of it and leave with the same exit code."""
    team = MpiTeam(comm)
    code = 1
    try:
        code = job(team)
    finally:
        if not team.started:
            comm.bcast(None, root=0)
        comm.bcast(code, root=0)
    return code
