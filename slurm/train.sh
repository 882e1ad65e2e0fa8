#!/usr/bin/env bash
# Trains a recipe on all ranks of a job; README.md beside this file tells more.
#
#     sbatch --nodes=4 --gpus-per-node=8 slurm/train.sh recipe=sfd_gda [key=value ...]
#
# Flags of sbatch go before train.sh and win over these; all after it is for `dist-fair train`.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

# sbatch runs a copy of this file: what lies beside it is found where it was submitted from.
here=$(dirname "$0")
if [[ ! -f $here/job.sh ]]; then
    here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
    here=${here%%/train.sh*}
fi
source "$here/job.sh"
run_ranks train "$@"
