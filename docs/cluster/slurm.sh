#!/bin/bash
# sbatch docs/cluster/slurm.sh RECIPE RUN         as often as you like: it resumes where it stopped
#SBATCH --job-name=higgstune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

recipe=$1
run=$2

# Between SIGTERM and SIGKILL of torchrun, 30 s otherwise; shorter than --signal above gives.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
export HF_HUB_OFFLINE=1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" \
    -m higgstune train "$recipe" --out "$run" --resume &
training=$!

# Slurm signals only this shell when time is nearly up; srun passes SIGTERM on to torchrun, which passes it on to training.
requeue=no
trap 'requeue=yes; kill -TERM "$training"' USR1
trap 'kill -TERM "$training"' TERM

wait "$training"
code=$?
while kill -0 "$training" 2>/dev/null; do # a trap has ended the wait, not the training
    wait "$training"
    code=$?
done
if [ "$requeue" = yes ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
