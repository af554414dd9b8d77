# shellcheck shell=bash
# What each task of a step runs, in the container where there is one: task.sh STYLE WORD ...
set -u
style=$1
shift
case $style in
one_task_per_node) # DeepSpeed's launcher starts this node's ranks; no node needs ssh to another
  hostfile=$(mktemp) || exit
  for node in $NODES; do printf '%s slots=%s\n' "$node" "$NPROC"; done >"$hostfile"
  "$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
  code=$?
  rm -f "$hostfile"
  ;;
one_task_per_gpu) # this task is a rank
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$NPROC LOCAL_SIZE=$NPROC
  "$PYTHON" -u "$@"
  code=$?
  ;;
share_of_pack) # rows I, I + N, I + 2 N, ... of the source, for task I of N
  share=$((SLURM_PROCID + 1)) source=$1 out=$2
  shift 2
  "$PYTHON" -m data_tools pack "$source" --out "$out/$(printf '%04d' "$share")" --share "$share/$SLURM_NTASKS" "$@"
  code=$?
  ;;
*)
  echo "error: found $style, expected one_task_per_node, one_task_per_gpu or share_of_pack" >&2
  exit 2
  ;;
esac
# srun ends the other tasks as soon as one fails, and then gives the code of a killed one. 75 of a training run, stopped by a
# signal and saved, is no failure: RUN/status has it. 2, for the user to mend, and 75 of the reference, which has no
# status, are what all ranks end with, within seconds: then all of them say so.
if [ $code = 75 ] && [ "$1" != launch/reference.py ]; then code=0; fi
case $code in
2 | 75)
  trap '' TERM
  sleep 5
  ;;
esac
exit $code
