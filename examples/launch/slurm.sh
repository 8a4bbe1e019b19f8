#!/usr/bin/env bash
#SBATCH --job-name=nextflow-ar
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# One torchrun a node over as many nodes as sbatch gives:
#
#   sbatch --nodes=2 examples/launch/slurm.sh recipes/7b_pretrain_256.yaml --set out=/shared/runs/mine
#
# Half an hour before the time is up (`nextflow-ar plan` says what a step takes), or after `scancel --batch --signal=USR1
# JOB`, the training finishes its step, saves and stops, and the job queues itself again: it goes on where it stopped, with
# as many nodes as it then has. The run's folder must be on a file system that all nodes see. Slurm itself requeues jobs of
# broken nodes, which then go on from the last checkpoint.
set -uo pipefail

on_node() {
    # torchrun would die of the signal, so it ignores it; the training's processes listen to it.
    (
        trap '' USR1
        exec torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
            --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$HEAD:29500" \
            --no-python nextflow-ar train "$@"
    ) &
    local launcher=$! status
    trap 'pkill -USR1 -P "$launcher"' USR1 TERM
    while # a signal ends the wait, not what is waited for
        wait "$launcher"
        status=$?
        kill -0 "$launcher" 2>/dev/null
    do :; done
    return "$status"
}
export -f on_node

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Since Slurm 22.05, srun does not take this over from sbatch by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

asked=""
srun --kill-on-bad-exit=0 bash -c 'on_node "$@"' on_node "$@" &
steps=$!
trap 'asked=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap : TERM # preempted: Slurm tells the nodes itself, and requeues
while
    wait "$steps"
    status=$?
    kill -0 "$steps" 2>/dev/null
do :; done

if [ -n "$asked" ] && [ "$status" -ne 0 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
