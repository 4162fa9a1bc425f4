# What a node is like: one line `what<TAB>value` a fact, in one file a task, in the probe's folder.
# Two tasks on two nodes meet there and try what leases and shards rest on. Set before: folder
# peers gpus scratch rounds image runtime program (an array).
me=${SLURM_PROCID:-0}
facts=$folder/facts-$me
tell() { printf '%s\t%s\n' "$1" "$2" >>"$facts"; }

# meet NAME: waits until every task has come here; fails after two minutes.
meet() {
  local peer waited=0
  : >"$folder/$1-$me"
  for ((peer = 0; peer < peers; peer++)); do
    until [ -e "$folder/$1-$peer" ]; do
      sleep 0.05
      waited=$((waited + 1))
      if [ "$waited" -gt 2400 ]; then tell lost "$1"; exit 1; fi
      ls "$folder" >/dev/null  # asks the server anew, where a client remembers absence
    done
  done
}

# race NAME COMMAND…: both tasks try the same for the same names, a few at a time so that neither
# runs away; how many this one has won.
race() {
  local what=$1 n won=0
  shift
  for ((n = 0; n < rounds; n++)); do
    [ $((n % 5)) != 0 ] || meet "$what-$n"
    if "$@" "$folder/$what.$n" 2>/dev/null; then won=$((won + 1)); fi
  done
  tell "won $what" "$won"
}
create() { (set -o noclobber; : >"$1"); }

tell node "$(uname -n)" || exit 1
meet begin
touch "$folder/clock-$me"
tell clock "$(date +%s) $(stat -c %Y "$folder/clock-$me")"
tell cores "${SLURM_CPUS_ON_NODE:-0}"
for place in "$folder" "${scratch:-${TMPDIR:-/tmp}}"; do
  if [ -d "$place" ] && [ -w "$place" ]; then
    tell disk "$place $(df -Pk "$place" | awk 'NR == 2 {print $4, $1}')"
    tell inodes "$place $(df -Pi "$place" | awk 'NR == 2 {print $2, $4}')"
  else tell closed "$place"; fi
done

if [ "$gpus" -gt 0 ]; then
  IFS=, read -ra seen <<<"${CUDA_VISIBLE_DEVICES:-${ROCR_VISIBLE_DEVICES:-}}"
  tell gpus "${#seen[@]}"
  if command -v nvidia-smi >/dev/null; then
    tell driver "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | head -n 1)"
  fi
fi

race create create
race link ln "$facts"
# A rename replaces a file at once: whoever reads it meanwhile sees one whole text or the other.
long=$(printf '%02000d' 0)
meet rename
if [ "$me" = 0 ]; then
  for ((n = 0; n < rounds; n++)); do
    echo "$n $long end" >"$folder/renaming" && mv "$folder/renaming" "$folder/renamed"
  done
  : >"$folder/renamed-over"
else
  torn=0
  for ((n = 0; n < 100 * rounds; n++)); do
    if [ -e "$folder/renamed-over" ]; then break; fi
    text=$(cat "$folder/renamed" 2>/dev/null) || continue
    case $text in *" $long end") ;; *) torn=$((torn + 1)) ;; esac
  done
  tell torn "$torn"
fi

# How late one node sees what another has made.
meet visible
if [ "$me" = 0 ]; then date +%s%N >"$folder/seen.tmp"; mv "$folder/seen.tmp" "$folder/seen"
else
  begin=$(date +%s%N)
  for ((n = 0; n < 1200; n++)); do if [ -e "$folder/seen" ]; then break; fi; sleep 0.05; done
  tell late "$((($(date +%s%N) - begin) / 1000000))"
fi

if [ -n "$image" ]; then
  command -v "$runtime" >/dev/null || tell absent "$runtime"
  [ -r "$image" ] || tell absent "$image"
fi
if said=$(timeout 180 "${program[@]}" --version 2>&1); then tell program "$(tail -n 1 <<<"$said")"
else tell broken "status $?: $(tail -n 1 <<<"$said")"; fi
if [ "$gpus" -gt 0 ]; then  # the driver may see what the payload's torch does not
  said=$(timeout 300 "${program[@]}" gpus 2>&1)
  tell seen "$? $(tail -n 1 <<<"$said")"
fi
tell done yes
