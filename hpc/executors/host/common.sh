# The bash around a payload. Every job's script sets its variables and reads this in; a run keeps a
# copy of its own, so that another version of the package never changes jobs in the queue.
set -u  # only from here on: modules and environments seldom bear it
asked= status=1 child=
inside=${image:+contained}
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then me=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
else me=$SLURM_JOB_ID; fi

# Runs the payload, which hears what Slurm tells this job; sets status. A payload that ends while
# another signal comes may leave bash without its status (-1): then the signal's own stands.
run() {
  local heard=1 found
  trap 'asked=${asked:-limit} heard=1; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null' USR1
  trap 'asked=leave heard=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
  "$@" &
  child=$!
  case $asked in limit) kill -USR1 "$child" ;; leave) kill -TERM "$child" ;; esac
  while [ -n "$heard" ]; do
    heard=
    wait "$child"
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
