"""By which variables launchers say how many ranks they have started. `launch/` uses it too."""

#: Set by MPICH and Intel MPI (Hydra) and Slurm's PMI, by Open MPI, and by MVAPICH2's mpirun_rsh.
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
