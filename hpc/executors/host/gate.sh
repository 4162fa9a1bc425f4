# What both kinds of job need; whoever reads this tries again where a node cannot see it yet.
. "${BASH_SOURCE%/*}/contained.sh" && . "${BASH_SOURCE%/*}/common.sh" || return

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

# Takes out of the queue what this stage, a decision, lets pass; the gates behind that then look,
# and pass. What it misses (a later attempt, say) sees the decision itself.
pass_over() {
  local other id ids=
  while read -r other; do
    id=$(recorded "$prefix-$other-a[0-9]*")
    [ -z "$id" ] || ids+=" $id"
  done <"$run/slurm/passed-$stage"
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

persist $inside "${payload[@]}"

said=$(mktemp); trap 'rm -f "$said"' EXIT
case $status in
  0)
    [ ! -e "$run/slurm/passed-$stage" ] || pass_over
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
