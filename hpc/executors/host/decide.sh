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
