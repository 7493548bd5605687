"""By which variables launchers say how many ranks they have started. `launch/` uses it too."""

from __future__ import annotations

from collections.abc import Mapping

#: Set by MPICH and Intel MPI (Hydra) and Slurm's PMI, by Open MPI, and by MVAPICH2's mpirun_rsh.
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def mpi_ranks(environment: Mapping[str, str]) -> int:
    """As many as an MPI launcher says; 1 where none does."""
    return max((int(size) for name in MPI_SIZES if (size := environment.get(name, "").strip()).isdecimal()), default=1)
