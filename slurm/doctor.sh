#!/usr/bin/env bash
# Looks at all that a run needs, on every rank of a job; README.md beside this file tells more.
#
#     sbatch --nodes=4 --gpus-per-node=8 slurm/doctor.sh [recipe=sfd_gda key=value ...]
#
# Flags of sbatch go before doctor.sh and win over these; all after it is for `dist-fair doctor`.
#SBATCH --job-name=doctor
#SBATCH --nodes=1
#SBATCH --no-requeue
#SBATCH --output=slurm-%j.out
set -euo pipefail

# sbatch runs a copy of this file: what lies beside it is found where it was submitted from.
here=$(dirname "$0")
if [[ ! -f $here/job.sh ]]; then
    here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
    here=${here%%/doctor.sh*}
fi
source "$here/job.sh"
run_ranks doctor "$@"
