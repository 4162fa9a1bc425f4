# What both kinds of job need; whoever reads this tries again where a node cannot see it yet.
. "${BASH_SOURCE%/*}/contained.sh" && . "${BASH_SOURCE%/*}/common.sh" || return

# COMMAND…: runs the payload, and again if it is killed (by a person, or for want of memory): its
# place is kept, and a training goes on from its checkpoint. A payload that fails by itself is
# the gate's to judge.
endure() {
  local try
  for try in 1 2 3; do
    run "$@"
    case $status in 130|138|143) return ;; esac
    [ "$status" -gt 128 ] && [ -z "$asked" ] && [ "$try" -lt 3 ] || return
    echo "control: the payload was killed (status $status); it begins again"
    sleep 2 &
    wait $!
    halted && return
    [ "$asked" != limit ] || status=75
    [ -z "$asked" ] || return
  done
}

if [ "$ranks" -gt 1 ]; then  # all at once, with the variables by which torch finds the others
  export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  start='exec "$@"'
  # A step's own bash knows of the image what this one does.
  [ -z "$inside" ] || start=$(declare -p run role ${!image*}; declare -f $(compgen -A function)
    echo 'contained "$@"')
  # Without ALL a step gets no more than the variables on the job's own list.
  endure srun --export=ALL --kill-on-bad-exit=1 bash -c 'export RANK=$SLURM_PROCID \
    WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE \
    NODE_RANK=$SLURM_NODEID; '"$start" rank "${payload[@]}"
else
  endure $inside "${payload[@]}"
fi

others=
[ "$status" != 78 ] || status=0 others=busy  # with all that is left: this worker ended well
ended
case $status in
  0)  # The stage is complete: its pending workers would find nothing to do. One asks for all.
    if [ -z "$others" ] && [ -n "${SLURM_ARRAY_JOB_ID:-}" ] &&
      mkdir "$run/slurm/swept-$SLURM_ARRAY_JOB_ID" 2>/dev/null
    then slurm scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; fi ;;
  75|138) again ;;
esac
exit "$status"
