# What the job scripts of this folder share; each sources it from the folder that sbatch was called in. bash 4.4 or newer.
# shellcheck shell=bash
set -u

# An array's first task has the array's own number as SLURM_JOB_ID: that alone would requeue or signal all of it.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
stop_signal=USR2 # what tells the ranks to save and end
asked_to_stop='' # the signal that came to this script

say() { printf '%s  job %s: %s\n' "$(date -u '+%F %T')" "$job" "$1"; }

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# Words before a command that put it into a container; see docs/clusters.md.
read -r -a inside <<<"${CONTAINER:-}"
[ ${#inside[@]} -gt 0 ] || [ -x "$(command -v "$PYTHON")" ] ||
  die "PYTHON is $PYTHON, and there is no such program; set it at the top of the script, or export it"

ask() { "${inside[@]}" "$PYTHON" launch/slurm/job.py "$@"; }

# SLURM sends --signal to this script alone (B:). It goes on to all processes of the step, and again and again: those that
# are still starting do not hear it. A launcher in between must not die of it, so steps begin with it ignored.
pass_on() {
  interrupted=1
  [ -z "$asked_to_stop" ] || return
  asked_to_stop=$1
  say "got $1: the ranks are told to save and end"
  while scancel --signal="$stop_signal" "$job"; do sleep 20; done 2>/dev/null &
  sender=$!
}
trap 'pass_on USR2' USR2
trap 'interrupted=1; say "got TERM, as the ranks do"' TERM # by scancel, by preemption, or at the time limit

# run_step SRUN-OPTION ... -- COMMAND ...: its exit code goes into $code.
run_step() {
  local options=() step status
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  # shellcheck disable=SC2016  # the inner shell expands it
  srun --export=ALL --mpi=none --kill-on-bad-exit=1 --wait=600 "${options[@]}" \
    bash -c 'trap "" USR2; exec "$@"' ignore_usr2 "${inside[@]}" "$@" &
  step=$! code=127
  while :; do # a signal ends `wait` before the step does
    interrupted=''
    wait "$step"
    status=$?
    [ $status = 127 ] || code=$status # 127: its end was seen already
    [ -n "$interrupted" ] || break
  done
  [ -z "$asked_to_stop" ] || kill "$sender" 2>/dev/null
  say "the step ended with exit code $code"
}

# Ranks meet at the job's first node, on a port that jobs which share that node do not share.
find_nodes() {
  NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol does not say which nodes this job has"
  MASTER_ADDR=${NODES%%$'\n'*}
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
  export NODES MASTER_ADDR MASTER_PORT PYTHON NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
  say "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), ranks meet at $MASTER_ADDR:$MASTER_PORT, start ${SLURM_RESTART_COUNT:-0}"
}

# run_ranks one_task_per_node|one_task_per_gpu SCRIPT CONFIG [key=value ...]
run_ranks() {
  local tasks=1 bind=(--cpu-bind=none)
  find_nodes
  if [ "$1" = one_task_per_gpu ]; then
    tasks=$NPROC
    bind=()
    # From SLURM 22.05 on srun does not take it over from sbatch, and a task would get one core.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || bind=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
  fi
  run_step --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((tasks * SLURM_JOB_NUM_NODES))" --ntasks-per-node="$tasks" \
    "${bind[@]}" -- bash launch/slurm/task.sh "$@"
}

# train one_task_per_node|one_task_per_gpu SCRIPT CONFIG [key=value ...]: run it, and submit this job again where
# RUN/status says that the same command goes on.
train() {
  local style=$1
  shift
  ask begin "$@" || exit
  run_ranks "$style" "$@"
  ask end "$code" "$@"
  case $? in
    0) exit 0 ;;
    75) requeue ;;
    *) exit $((code > 0 ? code : 1)) ;;
  esac
}

# For what has no RUN/status and goes on where it stopped: submit this job again only where it was asked to stop.
finish() {
  [ "$code" = 0 ] || { [ "$code" != 75 ] && [ -z "$asked_to_stop" ]; } || requeue
  exit "$code"
}

# A job that was cancelled or is out of time does not come back; one that is to make room for another still counts as
# running, and must not end by itself, or SLURM would take it for done.
requeue() {
  local state
  state=$(scontrol --oneliner show job "$job" | grep -o -m1 'JobState=[A-Z_]*' | head -n1)
  if [ "$state" != JobState=RUNNING ]; then
    say "not submitted again here, since the job is ${state#JobState=}; the same sbatch goes on"
    exit $((code > 0 ? code : 1))
  fi
  trap - TERM # with which SLURM ends this script
  say 'submitted again'
  scontrol requeue "$job" || die 'scontrol requeue was refused; submit the same command again by hand'
  sleep 300
}
