#!/bin/bash
# Two machines of eight GPUs under Slurm:
#
#   sbatch examples/slurm.sh transformer 1.3b --data /data/shards --out /runs/mine --preset zero2-bf16
#
# What follows the script's name is a command of dalle-train. All machines must see the same files under the same names,
# and the environment that dalle-train is installed in must be active. The same command again goes on where it stopped.
#
#SBATCH --job-name=dalle
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --output=slurm-%j.log

set -euo pipefail

# One task per machine, above: torchrun starts a process for each of its GPUs.
gpus_per_node="${GPUS_PER_NODE:-8}"
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port="$((20000 + SLURM_JOB_ID % 20000))"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540 # what ranks have to save, instead of torchrun's 30 seconds

# Ten minutes before the job's time is up Slurm sends SIGTERM to this script: dalle-train saves, and the job is queued
# again.
is_stopping=
trap 'is_stopping=yes; kill -TERM "$training"' TERM

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node "$gpus_per_node" \
    --rdzv_backend c10d \
    --rdzv_endpoint "${machines[0]}:$port" \
    --rdzv_id "$SLURM_JOB_ID" \
    --no-python dalle-train "$@" &
training=$!
code=0
wait "$training" || code=$?
if [ -n "$is_stopping" ]; then
    wait "$training" || true # the signal ended the first wait, not the training
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
