#!/usr/bin/env bash
# One rank, started by srun: torch's names for what Slurm says of it. Rank 0 speaks in the job's output, the others each
# in a file of their own.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID WORLD_SIZE=$SLURM_NTASKS
if [[ $RANK != 0 && ${DIST_FAIR_LOGS:-} ]]; then
    exec >>"$DIST_FAIR_LOGS/rank-$RANK.log" 2>&1
fi
exec "$@"  # no shell stays behind: signals reach the rank, and its exit code is srun's to see
