#!/usr/bin/env bash
# Scores data sets with trained detectors, on all ranks of a job; README.md beside this file tells more.
#
#     sbatch --gpus-per-node=8 slurm/evaluate.sh runs/a [runs/b ... --out runs/a_b] [data.eval=[...] ...]
#
# Flags of sbatch go before evaluate.sh and win over these; all after it is for `dist-fair evaluate`.
#SBATCH --job-name=evaluate
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
    here=${here%%/evaluate.sh*}
fi
source "$here/job.sh"
run_ranks evaluate "$@"
