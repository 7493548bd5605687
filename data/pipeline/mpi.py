"""The same job over MPI ranks: `mpiexec -n N python data/preprocess.py ...`. Rank 0 reads and writes, the others are its workers.

Only rank 0 touches files, so the other hosts need no shared file system; blocks of text go out and tokens come back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data.cli import Exit, UserError, sentence
from data.launchers import mpi_ranks
from data.pipeline.pool import InOrder, Team, in_order, start_worker
from data.pipeline.worker import WorkOptions
from data.terminal import drain, report


def run(job: Callable[[Team | None], int]) -> int:
    """Do the job on rank 0 with the other ranks as its team; every rank returns its exit code."""
    os.environ.setdefault("MPI4PY_FUTURES_BACKOFF", "0.001")  # seconds; idle ranks sleep instead of spinning
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no libmpi
        return report(
            UserError(f"a launcher's variables are set and MPI cannot be loaded ({sentence(error)}); unset them, or install it")
        )
    ranks = MPI.COMM_WORLD
    started = mpi_ranks(os.environ)
    if ranks.Get_size() < started:  # each rank would do the whole job
        return report(
            UserError(
                f"the launcher started {started} ranks and MPI sees {ranks.Get_size()}: mpi4py was built for another MPI; use that "
                "MPI's own mpiexec, or start without a launcher"
            )
        )
    if ranks.Get_size() == 1:
        return job(None)
    return serve(ranks) if ranks.Get_rank() else lead(ranks, job)


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
            code = report(error, who=f"rank {comm.Get_rank()}")
            drain()
            comm.Abort(code)
        with MPICommExecutor(comm, root=0):
            pass
    return int(comm.bcast(None, root=0))


def lead(comm: Any, job: Callable[[Team], int]) -> int:
    """Rank 0: do the job; whatever happens, the other ranks hear of it and leave with the same exit code."""
    team = MpiTeam(comm)
    code: int = Exit.FAULT
    try:
        code = job(team)
    finally:
        if not team.started:
            comm.bcast(None, root=0)
        comm.bcast(int(code), root=0)
    return code
