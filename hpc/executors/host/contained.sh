# Runs a command inside a container image. Set before: run role image image_runtime image_sha256
# image_stamp image_local image_scratch image_gpus, the arrays image_binds image_options
# image_passed.

# REASON: this node cannot run the image. Workers elsewhere go on, and a retry keeps away from
# here; what all others wait for ends the chain.
unable() {
  if [ "$role" != work ]; then halt "$1"; return; fi
  echo "image: $1" >&2
  return 125
}

# REASON: the image cannot be trusted: the chain ends, and says why.
halt() {
  echo "image: $1" >&2
  [ ! -d "$run/stages" ] || [ -e "$run/STOPPED" ] || [ -e "$run/CANCELLED" ] ||
    printf 'image on %s: %s\n' "$(uname -n)" "$1" >"$run/STOPPED"
  return 77
}

# The image is the one the run was submitted with: same size and time, or else the same bytes.
# The first job looks at the bytes in any case.
trusted() {
  local found
  [ -r "$image" ] || { unable "$image is not there, or not to be read; build or copy it"; return; }
  [ -n "$image_sha256" ] || return 0
  [ "$role" = preflight ] || [ "$(stat -Lc '%s %Y' "$image")" != "$image_stamp" ] || return 0
  found=$(sha256sum <"$image") || { unable "$image cannot be read whole"; return; }
  [ "${found%% *}" = "$image_sha256" ] || halt "$image is another image now (sha256 \
${found:0:16}…, the run has ${image_sha256:0:16}…); put the former back, or submit with --other-image"
}

# A folder of this command's own in node-local scratch, as $own. Those whose makers are gone are
# removed: each maker holds a lock in its folder. Nobody else may enter.
settle() {
  local base=${image_scratch:-${TMPDIR:-/tmp}}/hpc-$UID left lock held
  mkdir -p -m 700 "$base" && [ -O "$base" ] && [ ! -L "$base" ] && [ -w "$base" ] ||
    { unable "$base cannot be used; name another folder as scratch"; return; }
  exec {lock}>"$base/lock" && flock "$lock" &&
    own=$(mktemp -d "$base/job-XXXXXXXX") && mkdir -p "$own/tmp/home" &&
    exec {held}>"$own/lock" && flock -n "$held" ||
    { unable "$base is full, or cannot be written; free some space"; return; }
  for left in "$base"/job-*; do
    (flock -n 9 && rm -rf "$left") 9>"$left/lock"
  done
  [ -z "$image_local" ] || localize "$base/images"
  exec {lock}>&-
}

# FOLDER: reads the image from node-local scratch, brought there by the first job that needs it;
# where there is no room, from where it lies. Copies that nobody used for a week are removed.
localize() {
  local copy=$1/$image_sha256.sif found
  mkdir -p "$1" && find "$1" -name '*.sif*' -mtime +7 -delete
  if [ ! -e "$copy" ]; then
    if ! found=$(tee "$copy.part" <"$image" | sha256sum; exit "${PIPESTATUS[0]}") ||
      [ "${found%% *}" != "$image_sha256" ]; then
      rm -f "$copy.part"
      echo "image: not copied to $1 (no room?); read from $image" >&2
      return 0
    fi
    mv "$copy.part" "$copy"
  fi
  touch "$copy"
  image=$copy
}

# What passes into the image is named; nothing that the user or a module set for Apptainer does.
pack() {
  local name pattern
  for name in $(compgen -e); do
    case $name in
      APPTAINERENV_*|SINGULARITYENV_*|APPTAINER_*BIND*|SINGULARITY_*BIND*) unset "$name" ;;
    esac
  done
  for name in $(compgen -e); do
    for pattern in "${image_passed[@]}"; do
      case $name in $pattern) export "APPTAINERENV_$name=${!name}" ;; esac
    done
  done
  export APPTAINERENV_PYTHONNOUSERSITE=1 APPTAINERENV_TMPDIR=/tmp
  export APPTAINERENV_HPC_IMAGE="$1" APPTAINERENV_HPC_IMAGE_SHA256="$image_sha256"
  # One job's caches are nobody else's: processes that share them have corrupted them.
  export APPTAINERENV_XDG_CACHE_HOME=/tmp/cache APPTAINERENV_HF_HOME=/tmp/huggingface
  export APPTAINERENV_TRITON_CACHE_DIR=/tmp/triton APPTAINERENV_TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
  export APPTAINERENV_TORCH_EXTENSIONS_DIR=/tmp/extensions APPTAINERENV_CUDA_CACHE_PATH=/tmp/cuda
  export APPTAINERENV_VLLM_CACHE_ROOT=/tmp/vllm APPTAINERENV_NUMBA_CACHE_DIR=/tmp/numba
}

# COMMAND…: runs it inside the image and hands signals on; its status is the command's.
contained() {
  local own= held= words=() bind inner child= heard=1 asked= found status=1 given=$image
  trap 'asked=${asked:-USR1} heard=1; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null' USR1
  trap 'asked=TERM heard=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
  trusted || return
  command -v "$image_runtime" >/dev/null ||
    { unable "no $image_runtime on this node; install it, or load its module in \`setup\`"; return; }
  settle || return
  pack "$given"
  # --no-eval: or else Apptainer would run $(…) in a variable's value.
  words=("$image_runtime" --nocolor --quiet exec --cleanenv --no-eval --no-home --no-mount tmp,cwd)
  [ "$image_gpus" = 0 ] || words+=(--nv)
  [ "$UID" != 0 ] || words+=(--userns)  # root of a container lacks what setuid programs want
  words+=(--bind "$own/tmp:/tmp" --bind "$own/tmp:/var/tmp")
  for bind in "$run" "${image_binds[@]}"; do
    words+=(--bind "$bind")
    inner=${bind#*:}
    inner=${inner%%:*}
    # What is bound below /tmp needs a place in what is bound over it.
    case $inner in /tmp/*) if [ -d "${bind%%:*}" ]; then mkdir -p "$own$inner"
      else mkdir -p "$own${inner%/*}" && touch "$own$inner"; fi ;; esac
  done
  words+=(--pwd "$run" "${image_options[@]}" "$image")
  if [ "$role" = preflight ] && ! found=$("${words[@]}" true 2>&1); then
    rm -rf "$own"
    unable "$image_runtime cannot run $image: $(grep -m 1 -E 'FATAL|ERROR' <<<"$found" || tail -n 1 <<<"$found"); see docs/containers.md"
    return
  fi
  "${words[@]}" env HOME=/tmp/home "$@" &
  child=$!
  [ -z "$asked" ] || kill "-$asked" "$child"
  while [ -n "$heard" ]; do
    heard=
    wait "$child"
    found=$?
    [ "$found" = -1 ] || status=$found
  done 2>/dev/null
  rm -rf "$own"
  return "$status"
}
