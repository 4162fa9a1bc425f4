#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --export=HOME,USER,LOGNAME,SHELL,LANG,PATH,PYTHONPATH,VIRTUAL_ENV,HF_HOME
#SBATCH --job-name=iv-eval-iterative-dpo.gate-a0
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=500M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x.log
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=B:USR1@1
#SBATCH --time=10

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
name=$prefix-eval-iterative-dpo.gate-a0
log="$run/slurm/logs/$name.log"
stage=eval-iterative-dpo
attempt=0
role=gate
requeues=100
patience=600
nodes=1
cores=1
gpus=0
minutes=10
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
exported=(HOME USER LOGNAME SHELL LANG PATH PYTHONPATH VIRTUAL_ENV HF_HOME) notify=''
accounts=()
next_work=$prefix-eval-iterative-dpo-a1 next_gate=$prefix-eval-iterative-dpo.gate-a1
dependents=("results questions-train r0-generate r0-judge r0-score questions-test eval-base eval-base-reasoning set-direct sft-direct eval-direct-sft set-multi-turn sft-multi-turn eval-multi-turn set-summary sft-summary eval-summary-only set-reasoning sft-reasoning eval-multi-agent r1-generate r1-judge r1-score r1-pairs r1-reference r1-dpo r2-generate r2-judge r2-score r2-pairs r2-reference r2-dpo dpo-pairs dpo-reference dpo-train eval-dpo eval-iterative-dpo eval-judge-card")
# NAME: the id under which a job (a basic regular expression) was last recorded.
recorded() {
  sed -n 's/.*"event": "submitted", "name": "'"$1"'", "job": "\([0-9]*\)".*/\1/p' \
    "$run/jobs.jsonl" | tail -n 1
}

# NAME [OPTION…]: submits a script exactly once, also when sbatch times out or this gate is
# killed and starts again: it looks for the name before. Prints the id.
submit() {
  local job=$1 id= seen failed= word give_up=$((SECONDS + patience)) clean=(env -i)
  shift
  for word in "${exported[@]}" SLURM_CONF; do
    [ -z "${!word+set}" ] || clean+=("$word=${!word}")
  done
  while id=$(recorded "$job"); [ -z "$id" ]; do
    halted && return 1
    if seen=$(squeue --me --noheader --states=all --name="$job" --format=%F 2>&1); then
      id=$(printf '%s\n' "$seen" | sort -nu | head -n 1)
      [ -n "$id" ] || id=$("${clean[@]}" sbatch --parsable "$@" "$run/slurm/$job.sh" 2>"$said")
      id=${id%%;*}
      [ -z "$id" ] || break
      cat "$said" >&2
    fi
    [ "$SECONDS" -lt "$give_up" ] || return 1
    failed=1
    sleep 15  # longer than the controller keeps a request whose sender gave up
  done
  [ -n "$(recorded "$job")" ] || printf \
    '{"time": %s, "event": "submitted", "name": "%s", "job": "%s", "stage": "%s", "attempt": %d, "role": "%s"}\n' \
    "$(date +%s)" "$job" "$id" "$stage" "$((attempt + 1))" \
    "$(case $job in *.gate-*) echo gate ;; *) echo work ;; esac)" >>"$run/jobs.jsonl"
  if [ -n "$failed" ]; then  # A request that was given up may have come true all the same.
    seen=$(squeue --me --noheader --name="$job" --format=%F | sort -nu | grep -vx "$id")
    [ -z "$seen" ] || scancel $seen
  fi
  printf '%s\n' "$id"
}

# PARENT…: what a stage waits for: the last gate of each parent that has not passed it.
dependency() {
  local parent id ids=
  for parent; do
    id=$(recorded "$prefix-$parent\.gate-a[0-9]*")
    [ -n "$id" ] || continue
    grep -q '"event": "ended".*"job": "'"$id"'".*"status": 0,' "$run/jobs.jsonl" || ids+=":$id"
  done
  printf 'afterok%s' "$ids"
}

# Lets the dependents wait for the new gate. Two gates may do so for one dependent at once:
# each goes on until what it wrote is what the record says.
repoint() {
  local line child parents id after
  for line in "${dependents[@]}"; do
    read -r child parents <<<"$line"
    id=$(recorded "$prefix-$child-a[0-9]*")
    [ -n "$id" ] || continue
    after=
    while [ "$after" != "$(dependency $parents)" ]; do
      after=$(dependency $parents)
      slurm scontrol update "JobId=$id" "Dependency=$after" || return
    done
  done
}

# Another attempt: its workers, its gate, and the dependents behind that.
retry() {
  local work gate
  work=$(submit "$next_work") || return
  gate=$(submit "$next_gate" "--dependency=afterany:$work") || return
  echo "control: retry $work, gate $gate"
  repoint
}

# MESSAGE: tells whoever wants to know.
tell() { [ -z "$notify" ] || bash -c "$notify" notify "$run: $1"; }

# Whatever of the run is still queued or runs is asked to leave.
cancel_rest() {
  local ids
  ids=$(slurm squeue --me --noheader --format='%F %j' |
    awk -v prefix="$prefix-" -v me="$SLURM_JOB_ID" \
      'index($2, prefix) == 1 && $1 != me {print $1}' | sort -nu)
  [ -z "$ids" ] || slurm scancel $ids
}

# REASON: the chain ends here.
stop() {
  [ -e "$run/STOPPED" ] || [ -e "$run/CANCELLED" ] || printf '%s\n' "$1" >"$run/STOPPED"
  cancel_rest
  sleep 1
  cancel_rest  # what a gate beside this one submitted meanwhile
  tell "stopped: $(cat "$run/STOPPED" 2>/dev/null)"
  ended
  exit 77
}

# COMMAND…: runs the payload, and again if it dies: a hiccup of one node must not end the chain.
persist() {
  local try
  for try in 1 2 3; do
    run "$@"
    case $status in 0|75|76|77|138|143) return ;; esac
    [ -z "$asked" ] && [ "$try" -lt 3 ] || return
    echo "control: $role ended with status $status; trying again"
    sleep 5 &
    wait $!
    [ -z "$asked" ] || return
  done
}

# Where there is a budget: what jobs have used that were killed and could not note their end.
if [ ${#accounts[@]} -gt 0 ]; then
  all=$(sed -n 's/.*"event": "submitted".*"job": "\([0-9]*\)".*/\1/p' "$run/jobs.jsonl" | sort -u)
  if sacct "${accounts[@]}" "--jobs=${all//$'\n'/,}" >"$run/slurm/accounts.$SLURM_JOB_ID" 2>/dev/null
  then mv "$run/slurm/accounts.$SLURM_JOB_ID" "$run/slurm/accounts"
  else rm -f "$run/slurm/accounts.$SLURM_JOB_ID"; fi
fi

# command
persist insightv gate "$run" eval-iterative-dpo 0 0


# teardown
said=$(mktemp); trap 'rm -f "$said"' EXIT
case $status in
  0)
    if [ -e "$run/slurm/finished" ]; then
      cancel_rest  # a job that a node could not start is held for ever
      tell complete
    fi ;;
  76) retry || stop "stage $stage: the retry could not be submitted: $(tail -n 1 "$said")" ;;
  77) stop "stage $stage: $role without a reason" ;;
  75|138) again ;;
  143) ;;  # preempted, then Slurm queues it again; or cancelled
  *) stop "stage $stage: its $role ended with status $status; see $log" ;;
esac
ended
exit "$status"
