# What the job scripts share. They set `here`, source this, and call run_ranks or run_alone, which end the script.

restarts=${DIST_FAIR_RESTARTS:-3} # in a row, of a job whose ranks keep dying

say() { echo "slurm job ${job:-}: $*" >&2; }

# run_ranks VERB ARGUMENT...: `dist_fair.VERB` on every rank of the job.
run_ranks() {
    prepare
    local verb=$1 ranks cpus placing
    shift
    # One rank per GPU; without GPUs as many as were asked for.
    ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
    cpus=$(tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sort -n | head -n 1) # 8(x3),4: the poorest node's
    cpus=${cpus%%(*}
    placing=(--cpus-per-task=$((cpus / ranks)))
    if ((cpus < ranks)); then
        placing=(--overcommit)
        say "warning: $ranks ranks share $cpus CPU(s) of a node: ask for more, with --cpus-per-gpu or --cpus-per-task"
    fi
    # Slurm's own address of the first node: resolves wherever Slurm works. Another port after each requeue, since what
    # is left of the last start may still hold its port.
    MASTER_ADDR=$(scontrol -o show node "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
    MASTER_ADDR=${MASTER_ADDR#*NodeAddr=}
    export MASTER_ADDR=${MASTER_ADDR%% *} MASTER_PORT=$((10000 + (job + 7919 * start) % 20000))
    export LOCAL_WORLD_SIZE=$ranks OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus < ranks ? 1 : cpus / ranks))}
    # How sbatch was to count is settled by now; srun would read these as further wishes.
    unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_GPU_BIND
    say "start $start: $((SLURM_JOB_NUM_NODES * ranks)) ranks on $SLURM_JOB_NODELIST, rank 0 at $MASTER_ADDR:$MASTER_PORT," \
        "the others' output in $DIST_FAIR_LOGS"
    # Slurm signals this too, and without it srun could not say how the ranks end.
    exec {sink}> >(trap "" USR1 USR2 TERM && exec tee "$DIST_FAIR_LOGS/errors.log" >&2)
    local tee=$!
    supervise srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * ranks)) --ntasks-per-node="$ranks" \
        "${placing[@]}" --export=ALL --kill-on-bad-exit=1 bash "$here/rank.sh" "${python[@]}" -m "dist_fair.$verb" "$@" 2>&"$sink"
    exec {sink}>&-
    wait "$tee"
    judge
    conclude
}

# run_alone VERB ARGUMENT...: `dist_fair.VERB` in one process beside this script, free to submit jobs of its own.
run_alone() {
    prepare
    local verb=$1 name
    shift
    for name in "${!SLURM_@}"; do # a job submitted from here would inherit the shape of this one
        [[ $name == SLURM_CONF ]] || unset "$name"
    done
    supervise "${python[@]}" -m "dist_fair.$verb" "$@"
    ((code != 128 + 10)) || code=75 # SIGUSR1, before it listened
    conclude
}

prepare() {
    job=${SLURM_JOB_ID:?submit this with sbatch} start=${SLURM_RESTART_COUNT:-0}
    folder=$PWD/slurm-$job
    export DIST_FAIR_LOGS=$folder/start-$start PYTHONUNBUFFERED=1
    mkdir -p "$DIST_FAIR_LOGS"
    find_python
}

# The interpreter that has dist_fair, as the array `python`: DIST_FAIR_PYTHON (a path, or a command such as
# "apptainer exec --nv image.sif python3"), the virtual environment this was submitted from, .venv, or that of PATH.
find_python() {
    local found=${DIST_FAIR_PYTHON:-} candidate
    for candidate in "${VIRTUAL_ENV:-}" "$here/../.venv" "$PWD/.venv"; do
        [[ -z $found && -x $candidate/bin/python ]] && found=$candidate/bin/python
    done
    python=("${found:=python3}")
    [[ -x $found ]] || read -ra python <<<"$found"
    if ! "${python[@]}" -c "import dist_fair"; then
        say "error: '$found' has no dist_fair: set DIST_FAIR_PYTHON to the interpreter that has it"
        exit 2
    fi
}

# supervise COMMAND...: runs it to its end, `code` its exit code. Signals that reach this script are passed on as USR1:
# end at the next step. (srun takes TERM for itself and would kill the ranks.)
supervise() {
    local pid
    "$@" &
    pid=$!
    trap 'kill -USR1 "$pid" 2>/dev/null || true' USR1 TERM
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a signal ends a wait, not the command
    trap : USR1 TERM
    code=0
    wait "$pid" || code=$?
}

# What decides is how the first rank ended, not how srun then ended the others: that becomes `code`. A signal that says
# "end" to a rank that is still starting, and does not listen yet, stops it in time too.
judge() {
    local first rank
    first=$(sed -nE 's/^srun: error: [^ ]+: tasks? ([0-9]+)[^:]*: (Exited with exit code )?/\1 /p' "$DIST_FAIR_LOGS/errors.log")
    first=${first%%$'\n'*} rank=${first%% *}
    case ${first#* } in
    [0-9]*) code=${first#* } ;;
    "User defined signal 1" | Terminated) code=75 ;;
    esac
    if [[ $code != 75 && -s $DIST_FAIR_LOGS/rank-$rank.log ]]; then
        say "rank $rank ended first; the end of its log:"
        tail -n 5 "$DIST_FAIR_LOGS/rank-$rank.log" >&2
    fi
}

# Ends this script: done, an error of the user's, pre-empted, or a lost rank.
conclude() {
    local lost="$folder/lost"
    case $code in
    0) exit 0 ;;
    2) exit 2 ;; # the user can mend it; starting again cannot
    75)
        rm -f "$lost"
        requeue "stopped in time, all is saved"
        ;;
    esac
    echo "start $start: exit code $code" >>"$lost"
    if (($(wc -l <"$lost") > restarts)); then
        say "error: exit code $code, and so ended the $restarts starts before: given up"
        exit "$code"
    fi
    requeue "a rank was lost (exit code $code)"
}

requeue() {
    if [[ $(scontrol -o show job "$job") != *" JobState=RUNNING "* ]]; then # cancelled, say: it is decided already
        say "$1; ended by Slurm"
    elif (trap "" TERM && exec scontrol requeue "$job"); then # Slurm ends this script before it answers
        say "$1; requeued"
        exit 0
    else
        say "$1; cannot be requeued: submit it again, and it goes on from the last checkpoint"
    fi
    exit "$code"
}
