#!/usr/bin/env bash
# DeepSpeed's own launcher over several hosts:   launch/templates/hostfile.sh --data shards/ --output runs/first
#
# HOSTFILE has one line a host, "node0 slots=8", and pdsh with password-less ssh starts the ranks there. Without ssh, run on every
# node   NODE_RANK=0 launch/templates/hostfile.sh ...   (1 on the second, ...) with MASTER_ADDR naming the first.
# Of the environment pdsh takes NCCL_*, PYTHON* and a few more along; what else the ranks need (GLOO_SOCKET_IFNAME=eth0,
# MOE_KERNELS=0) goes into ~/.deepspeed_env or ./.deepspeed_env, a line each.
set -euo pipefail
HOSTFILE=${HOSTFILE:-hosts}
# Without the file deepspeed would train on this host alone.
[ -r "$HOSTFILE" ] || { echo "error: no hostfile $HOSTFILE; write one (node0 slots=8), or name yours in HOSTFILE" >&2; exit 2; }
flags=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
    flags+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
fi
exec deepspeed "${flags[@]}" launch/train.py "$@"
