#!/usr/bin/env bash
# DeepSpeed's own launcher over several hosts:   launch/templates/hostfile.sh --data shards/ --output runs/first
#
# HOSTFILE has one line a host, "node0 slots=8", and pdsh with password-less ssh starts the ranks there. Without ssh, run on every
# node   NODE_RANK=0 launch/templates/hostfile.sh ...   (1 on the second, ...) with MASTER_ADDR naming the first.
set -euo pipefail
flags=(--hostfile "${HOSTFILE:-hosts}" --master_port "${MASTER_PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
    flags+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
fi
exec deepspeed "${flags[@]}" launch/train.py "$@"
