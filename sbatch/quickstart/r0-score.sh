#!/bin/bash

# Parameters
#SBATCH --array=0-1
#SBATCH --cpus-per-task=1
#SBATCH --export=HOME,USER,LOGNAME,SHELL,LANG,PATH,PYTHONPATH,VIRTUAL_ENV,HF_HOME
#SBATCH --gpus-per-node=1
#SBATCH --job-name=iv-r0-score-a0
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=1800M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=stages/r0-score/logs/a0-%a.log
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --time=30

# setup
export PYTHONUNBUFFERED=1
export PYTHONNOUSERSITE=1
export HF_HUB_OFFLINE=1
export HPC_LEASE_TTL=60
export HPC_STALL=1800
export OMP_NUM_THREADS=1
export MKL_NUM_THREADS=1
# Submitted from the run directory, under a name with the run's id; see chain.sh
run=$SLURM_SUBMIT_DIR
prefix=iv-$(cat "$run/slurm/id")
name=$prefix-r0-score-a0
log="$run/stages/r0-score/logs/a0-*.log"
stage=r0-score
attempt=0
role=work
requeues=100
patience=600
nodes=1
cores=1
gpus=1
minutes=30
payload=''
set -u  # only from here on: modules and environments seldom bear it
asked= status=1
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then me=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
else me=$SLURM_JOB_ID; fi

# Runs the payload, which hears what Slurm tells this job; sets status. A payload that ends while
# another signal comes may leave bash without its status (-1): then the signal's own stands.
run() {
  local heard=1 found
  trap 'asked=${asked:-limit} heard=1; [ -z "$payload" ] || kill -USR1 "$payload" 2>/dev/null' USR1
  trap 'asked=leave heard=1; [ -z "$payload" ] || kill -TERM "$payload" 2>/dev/null' TERM INT
  "$@" &
  payload=$!
  case $asked in limit) kill -USR1 "$payload" ;; leave) kill -TERM "$payload" ;; esac
  while [ -n "$heard" ]; do
    heard=
    wait "$payload"
    found=$?
    [ "$found" = -1 ] || status=$found
  done 2>/dev/null
}

# EVENT MORE: tells the run that this job began, which counts if it is killed, or how it ended;
# what it stored stands in the run directory already.
note() {
  printf '{"time": %s, "event": "%s", "name": "%s", "job": "%s", "stage": "%s", "attempt": %d, "role": "%s", "node": "%s", "restart": %d, "nodes": %d, "cores": %d, "gpus": %d, %s}\n' \
    "$(date +%s)" "$1" "$name" "$me" "$stage" "$attempt" "$role" "${SLURMD_NODENAME:-$(hostname)}" \
    "${SLURM_RESTART_COUNT:-0}" "$nodes" "$cores" "$gpus" "$2" >>"$run/jobs.jsonl"
}
ended() { note ended "\"seconds\": $SECONDS, \"status\": $status, \"asked\": \"$asked\""; }
note began "\"minutes\": $minutes"

# Whether the run was cancelled or stopped.
halted() { [ -e "$run/CANCELLED" ] || [ -e "$run/STOPPED" ]; }

# COMMAND…: talks to Slurm, again and again while its controller is away.
slurm() {
  local said give_up=$((SECONDS + patience))
  until said=$("$@" 2>&1); do
    case $said in
      *ontact*|*"timed out"*|*efused*|*emporar*|*"Zero Bytes"*|*"try again"*|*"nexpected message"*)
        if [ "$SECONDS" -lt "$give_up" ]; then sleep 5; continue; fi ;;
    esac
    printf '%s\n' "$said"
    return 1
  done
  printf '%s\n' "$said"
}

# Queues this job again, the array element alone, unless it was cancelled or did so too often.
again() {
  [ "$asked" = leave ] || halted || [ "${SLURM_RESTART_COUNT:-0}" -ge "$requeues" ] && return
  echo "control: queued again at the time limit (restart ${SLURM_RESTART_COUNT:-0})"
  slurm scontrol requeue "$me" || return
  sleep 60  # Slurm ends this script when it puts the job back.
}

# command
run insightv work "$run" r0-score


# teardown
ended
case $status in
  0)  # The stage is complete: its pending workers would find nothing to do. One asks for all.
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && mkdir "$run/slurm/swept-$SLURM_ARRAY_JOB_ID" 2>/dev/null
    then slurm scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; fi ;;
  75|138) again ;;
esac
exit "$status"
