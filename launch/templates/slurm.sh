#!/usr/bin/env bash
# Slurm: sbatch launch/templates/slurm.sh   (from the clone; edit the #SBATCH lines)
#
# DATA and OUTPUT name the folders; flags of launch/train.py may follow: DATA=shards sbatch launch/templates/slurm.sh --model 4b
#
# Five minutes before the time limit Slurm sends SIGUSR1 to this script (`B:`; without it the signal goes to the ranks alone, and
# nobody is left who knows that the job must go on). The script passes it on to the ranks, which save after their step and exit
# with 0, and queues the job again with `scontrol requeue`. Likewise where another job takes the nodes (PreemptMode=REQUEUE with a
# GraceTime): there Slurm asks the ranks alone, with SIGTERM, and would take what has ended within the grace time for finished. A run
# that ends by itself is not queued again. A lost node requeues as well (--requeue, after Slurm's SlurmdTimeout); a run that fails
# does not: look at its last lines, then submit it again. The 300 seconds must be enough for the rest of an evaluation and a save.
#SBATCH --job-name=moe-code-gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=moe-%j.log
set -euo pipefail

DATA=${DATA:-shards}
OUTPUT=${OUTPUT:-runs/slurm}
source "${VENV:-.venv}/bin/activate"

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*} # the first; `| head` would end scontrol early, and with it this script
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# Hosts with several networks: name the one that the ranks reach each other by, here or in your shell, for NCCL and for gloo
# (control messages; all traffic on CPUs). `ip -br addr` lists them.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Since Slurm 22.05 srun gives a task one core, whatever --cpus-per-task says above, unless it is told again.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# One process a GPU, started by srun itself: no ssh, the environment travels, and a failed task ends the step (-K). Every task
# sees the GPUs of its node and takes the one of its LOCAL_RANK; a cluster that binds them (--gpus-per-task) shows it one.
srun --kill-on-bad-exit=1 ${GPUS_PER_TASK:+--gpus-per-task="$GPUS_PER_TASK"} \
    python launch/train.py --data "$DATA" --output "$OUTPUT" "$@" &
step=$!

asked=""
pass_on() {
    asked=yes
    kill -USR1 "$step" # srun forwards it to every task
}
trap pass_on USR1

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do code=0; wait "$step" || code=$?; done # the signal ends `wait` before the ranks end

preempted() {
    case $(scontrol show job "$SLURM_JOB_ID") in *PreemptTime=[0-9]*) ;; *) false ;; esac
}
# Ranks that were still joining have nothing to save, and end with 128 + SIGTERM.
if { [ "$code" -eq 0 ] && [ -n "$asked" ]; } || { { [ "$code" -eq 0 ] || [ "$code" -eq 143 ]; } && preempted; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
