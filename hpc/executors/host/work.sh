ended
case $status in
  0)  # The stage is complete: its pending workers would find nothing to do. One asks for all.
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && mkdir "$run/slurm/swept-$SLURM_ARRAY_JOB_ID" 2>/dev/null
    then slurm scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; fi ;;
  75|138) again ;;
esac
exit "$status"
