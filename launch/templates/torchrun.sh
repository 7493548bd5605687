#!/usr/bin/env bash
# torchrun: on every node   NODES=2 RDZV=node0:29400 launch/templates/torchrun.sh --data shards/ --output runs/first
#
# A rank that fails ends the others; torchrun starts all of them again, up to RESTARTS times, and they resume from the newest
# whole checkpoint; after a mistake (exit code 2) as well, which RESTARTS=0 spares. One node needs neither NODES nor RDZV.
set -euo pipefail
# Else ranks that are started again find the addresses of those before them in the store that torchrun keeps (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${RDZV:-localhost:0}" launch/train.py "$@"
