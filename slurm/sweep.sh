#!/usr/bin/env bash
# Keeps a sweep going: one process that submits the sweep's jobs and waits for them; README.md beside this file tells
# more.
#
#     sbatch --time=7-0 slurm/sweep.sh recipe=daid seed=0,1,2 cluster=slurm [key=value,value ...]
#
# Flags of sbatch go before sweep.sh and win over these; all after it is for `dist-fair sweep`.
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

# sbatch runs a copy of this file: what lies beside it is found where it was submitted from.
here=$(dirname "$0")
if [[ ! -f $here/job.sh ]]; then
    here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
    here=${here%%/sweep.sh*}
fi
source "$here/job.sh"
run_alone sweep "$@"
