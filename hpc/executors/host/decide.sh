said=$(mktemp); trap 'rm -f "$said"' EXIT
case $status in
  0) [ ! -e "$run/slurm/finished" ] || tell complete ;;
  76) retry || stop "stage $stage: the retry could not be submitted: $(tail -n 1 "$said")" ;;
  77) stop "stage $stage: $role without a reason" ;;
  75|138) again ;;
  143) ;;  # preempted, then Slurm queues it again; or cancelled
  *) stop "stage $stage: its $role ended with status $status; see $log" ;;
esac
ended
exit "$status"
