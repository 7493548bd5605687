#!/usr/bin/env bash
# Slurm: sbatch launch/templates/slurm.sh   (from the clone; edit the #SBATCH lines and the last command)
#
# Slurm sends SIGUSR1 five minutes before the time limit; all ranks then save after their step and exit with 0, and the job is
# queued again by `scontrol requeue` until the run says that it is finished. A crash or a lost node requeues as well (--requeue).
#SBATCH --job-name=moe-code-gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=moe-%j.log
set -euo pipefail

DATA=${DATA:-shards}
OUTPUT=${OUTPUT:-runs/slurm}
source "${VENV:-.venv}/bin/activate"

# One process a GPU, started by srun itself: no ssh, the environment travels, and a failed task ends the step (-K).
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

stopped=""
trap 'stopped=yes' USR1
code=0
srun --kill-on-bad-exit=1 python launch/train.py --data "$DATA" --output "$OUTPUT" "$@" &
step=$!
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do code=0; wait "$step" || code=$?; done # the signal ends `wait` before the ranks end

if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
