#!/usr/bin/env bash
# MPI (MPICH, Open MPI, MVAPICH; mpi4py finds ranks and hosts):
#   RANKS=16 launch/templates/mpiexec.sh --data shards/ --output runs/first
# More hosts: MPIEXEC_FLAGS='-f hosts' (MPICH) or '--hostfile hosts' (Open MPI).
set -euo pipefail
# shellcheck disable=SC2086 # the flags are several words
exec mpiexec ${MPIEXEC_FLAGS:-} -n "${RANKS:-8}" python launch/train.py "$@"
