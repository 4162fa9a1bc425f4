#!/bin/bash
# Serves one model over several nodes: tensor-parallel on each, pipeline-parallel between them.
#   MODEL=/models/qwen2-vl-72b KEY_FILE=~/.config/insightv/generator.key sbatch vllm-nodes.sh
# Its log names the address for `models.generator.engine.server.url`. Needs vLLM with Ray in
# PYTHON's environment, at the same path on all nodes.
#SBATCH --job-name=generator
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --exclusive  # Ray asks nobody for a key: the nodes must be yours alone
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
: "${MODEL:?give a model folder}" "${KEY_FILE:?give a file for the key}"
PYTHON=${PYTHON:-/envs/vllm/bin/python} PORT=${PORT:-8000} RAY_PORT=${RAY_PORT:-6379}
gpus=${SLURM_GPUS_PER_NODE:-4}
gpus=${gpus##*:}

# The key stands in a file only you can read and in the environment, on no command line.
umask 077
mkdir -p "$(dirname "$KEY_FILE")"
[ -s "$KEY_FILE" ] || "$PYTHON" -c 'import secrets; print(secrets.token_urlsafe(32))' >"$KEY_FILE"
VLLM_API_KEY=$(<"$KEY_FILE")
export VLLM_API_KEY HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

# One job's caches are nobody else's.
export RAY_TMPDIR=${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID VLLM_CACHE_ROOT=${TMPDIR:-/tmp}/vllm-$SLURM_JOB_ID

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
bin=$(dirname "$PYTHON")
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

srun --nodes=1 --ntasks=1 -w "$head" --overlap \
  "$bin/ray" start --head --node-ip-address="$head" --port="$RAY_PORT" --num-gpus="$gpus" \
  --include-dashboard=false --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) -x "$head" --overlap \
    "$bin/ray" start --address="$head:$RAY_PORT" --num-gpus="$gpus" --block &
  sleep 20
fi

echo "url: [\"http://$head:$PORT\"]"
srun --nodes=1 --ntasks=1 -w "$head" --overlap env RAY_ADDRESS="$head:$RAY_PORT" \
  "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$MODEL" --host "$head" --port "$PORT" \
  --distributed-executor-backend ray --tensor-parallel-size "$gpus" \
  --pipeline-parallel-size "$SLURM_JOB_NUM_NODES" --uvicorn-log-level warning &
wait $!
