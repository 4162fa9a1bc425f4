#!/usr/bin/env bash
# One machine of the test cluster, started inside its own mount and UTS (nodes: PID) namespaces.
# usage: machine.sh NAME ROOT [DOOR ...] -- [DAEMON ...]
# Only here, and not on the host: /etc/slurm, /run/munge, users and hosts are the cluster's. A DOOR
# is a folder inside a directory that others may not enter (a Python under a private home): the
# closed directory is covered by an empty one that holds nothing but the doors.
# Without a DAEMON the machine just stays; with one it ends with it. It reaps orphans as init would.
set -euo pipefail
name=$1 root=$2
shift 2
doors=()
while [ "$1" != -- ]; do doors+=("$1"); shift; done
shift

hostname "$name"
mount --bind "$root/etc" /etc/slurm
mount --bind "$root/munge" /run/munge
for file in passwd group hosts; do mount --bind "$root/etc/$file" "/etc/$file"; done

declare -A closed
for n in "${!doors[@]}"; do
  part=
  IFS=/ read -ra parts <<<"${doors[n]#/}"
  for piece in "${parts[@]}"; do
    part+=/$piece
    if [ $((0$(stat -c %a "$part") & 1)) = 0 ]; then closed[$part]=1; break; fi
  done
  mkdir -p "$root/run/door/$name/$n"
  mount --bind "${doors[n]}" "$root/run/door/$name/$n"
done
for directory in "${!closed[@]}"; do mount -t tmpfs -o mode=755,size=1m tmpfs "$directory"; done
for n in "${!doors[@]}"; do
  mkdir -p "${doors[n]}"
  mount --move "$root/run/door/$name/$n" "${doors[n]}"
done

touch "$root/run/$name.ready"
if [ $# = 0 ]; then exec sleep infinity; fi
trap 'kill -TERM "$daemon" 2>/dev/null' TERM
"$@" &
daemon=$!
while kill -0 "$daemon" 2>/dev/null; do wait "$daemon" || true; done
