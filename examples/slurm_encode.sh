#!/usr/bin/env bash
# Encode a corpus on a SLURM cluster: sbatch examples/slurm_encode.sh my-model corpus.jsonl vectors
# Further arguments go to `st-llm-embed encode`. All machines see the three paths.
#
# Each task of the array is so many workers as its machine has GPUs. None needs to know its number: they share the
# shards by what is in the folder. So tasks may start when the queue lets them, and more may be submitted at any time;
# one that is preempted is queued again and goes on; those that are left when all is done see that and end.
#
# `srun --ntasks-per-node=8 --gpus-per-task=1 st-llm-embed encode ...` does for a machine of 8 GPUs what torchrun does here.
#SBATCH --job-name=encode
#SBATCH --array=1-8
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --output=encode-%A-%a.log
set -euo pipefail
[ $# -ge 3 ] || { echo "Usage: sbatch $0 MODEL CORPUS FOLDER [arguments of st-llm-embed encode]" >&2 && exit 2; }
model=$1 corpus=$2 folder=$3
shift 3
torchrun --standalone --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" -m st_llm_embed encode \
    "$model" "$corpus" --output "$folder" "$@"
