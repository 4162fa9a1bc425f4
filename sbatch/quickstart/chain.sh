#!/bin/bash
# Submits the whole chain by hand: chain.sh [RUN], RUN being the run directory. Call it from where
# the files named below are found.
# Written by: insightv plan configs/chain/quickstart.yaml --cluster configs/cluster/testbed.yaml --write sbatch/quickstart
set -euo pipefail
run=${1:-runs/quickstart}
scripts=$(cd "$(dirname "$0")" && pwd)
insightv plan configs/chain/quickstart.yaml --cluster configs/cluster/testbed.yaml --run-dir "$run" --prepare
cd "$run"
mkdir -p slurm/logs
cp -r "$scripts"/host-* slurm  # what the scripts read
prefix=iv-$(cat slurm/id)
if grep -qs "\"name\": \"$prefix-preflight-a0\"" jobs.jsonl; then
  echo "$run: submitted before; \`insightv submit\` adds what is missing" >&2
  exit 2
fi

declare -A id  # of each job, by its script
send() {  # SCRIPT STAGE ATTEMPT ROLE CONDITION [SCRIPT…]: submits a job behind others, records it
  local script=$1 stage=$2 attempt=$3 role=$4 after=$5 name parent
  name=$prefix-$script-a$attempt
  shift 5
  for parent; do after+=:${id[$parent]}; done
  id[$script]=$(sbatch --parsable --job-name="$name" ${after:+"--dependency=$after"} \
    "$scripts/$script.sh")
  id[$script]=${id[$script]%%;*}
  printf '{"time": %s, "event": "submitted", "name": "%s", "job": "%s", ' \
    "$(date +%s)" "$name" "${id[$script]}" >>jobs.jsonl
  printf '"stage": "%s", "attempt": %d, "role": "%s"}\n' "$stage" "$attempt" "$role" >>jobs.jsonl
  echo "${id[$script]}  $name"
}

send preflight preflight 0 preflight ''
send questions-train questions-train 0 work afterok preflight
send questions-train.gate questions-train 0 gate afterany questions-train
send questions-test questions-test 0 work afterok preflight
send questions-test.gate questions-test 0 gate afterany questions-test
send r0-generate r0-generate 0 work afterok questions-train.gate
send r0-generate.gate r0-generate 0 gate afterany r0-generate
send eval-base eval-base 0 work afterok questions-test.gate
send eval-base.gate eval-base 0 gate afterany eval-base
send eval-base-reasoning eval-base-reasoning 0 work afterok questions-test.gate
send eval-base-reasoning.gate eval-base-reasoning 0 gate afterany eval-base-reasoning
send r0-judge r0-judge 0 work afterok questions-train.gate r0-generate.gate
send r0-judge.gate r0-judge 0 gate afterany r0-judge
send r0-score r0-score 0 work afterok questions-train.gate r0-generate.gate r0-judge.gate
send r0-score.gate r0-score 0 gate afterany r0-score
send set-direct set-direct 0 work afterok questions-train.gate r0-generate.gate r0-judge.gate r0-score.gate
send set-direct.gate set-direct 0 gate afterany set-direct
send set-multi-turn set-multi-turn 0 work afterok questions-train.gate r0-generate.gate r0-judge.gate r0-score.gate
send set-multi-turn.gate set-multi-turn 0 gate afterany set-multi-turn
send set-summary set-summary 0 work afterok questions-train.gate r0-generate.gate r0-judge.gate r0-score.gate
send set-summary.gate set-summary 0 gate afterany set-summary
send set-reasoning set-reasoning 0 work afterok questions-train.gate r0-generate.gate r0-judge.gate r0-score.gate
send set-reasoning.gate set-reasoning 0 gate afterany set-reasoning
send sft-direct sft-direct 0 work afterok set-direct.gate
send sft-direct.gate sft-direct 0 gate afterany sft-direct
send sft-multi-turn sft-multi-turn 0 work afterok set-multi-turn.gate
send sft-multi-turn.gate sft-multi-turn 0 gate afterany sft-multi-turn
send sft-summary sft-summary 0 work afterok set-summary.gate
send sft-summary.gate sft-summary 0 gate afterany sft-summary
send sft-reasoning sft-reasoning 0 work afterok set-reasoning.gate
send sft-reasoning.gate sft-reasoning 0 gate afterany sft-reasoning
send eval-direct-sft eval-direct-sft 0 work afterok questions-test.gate sft-direct.gate
send eval-direct-sft.gate eval-direct-sft 0 gate afterany eval-direct-sft
send eval-multi-turn eval-multi-turn 0 work afterok questions-test.gate sft-multi-turn.gate
send eval-multi-turn.gate eval-multi-turn 0 gate afterany eval-multi-turn
send eval-summary-only eval-summary-only 0 work afterok questions-test.gate sft-summary.gate
send eval-summary-only.gate eval-summary-only 0 gate afterany eval-summary-only
send eval-multi-agent eval-multi-agent 0 work afterok questions-test.gate sft-reasoning.gate sft-summary.gate
send eval-multi-agent.gate eval-multi-agent 0 gate afterany eval-multi-agent
send r1-generate r1-generate 0 work afterok questions-train.gate sft-reasoning.gate
send r1-generate.gate r1-generate 0 gate afterany r1-generate
send eval-judge-card eval-judge-card 0 work afterok questions-test.gate eval-multi-agent.gate sft-summary.gate
send eval-judge-card.gate eval-judge-card 0 gate afterany eval-judge-card
send r1-judge r1-judge 0 work afterok questions-train.gate r1-generate.gate
send r1-judge.gate r1-judge 0 gate afterany r1-judge
send r1-score r1-score 0 work afterok questions-train.gate r1-generate.gate r1-judge.gate
send r1-score.gate r1-score 0 gate afterany r1-score
send r1-pairs r1-pairs 0 work afterok questions-train.gate r1-generate.gate r1-judge.gate r1-score.gate
send r1-pairs.gate r1-pairs 0 gate afterany r1-pairs
send r1-reference r1-reference 0 work afterok r1-pairs.gate sft-reasoning.gate
send r1-reference.gate r1-reference 0 gate afterany r1-reference
send r1-dpo r1-dpo 0 work afterok r1-reference.gate sft-reasoning.gate
send r1-dpo.gate r1-dpo 0 gate afterany r1-dpo
send r2-generate r2-generate 0 work afterok questions-train.gate r1-dpo.gate
send r2-generate.gate r2-generate 0 gate afterany r2-generate
send r2-judge r2-judge 0 work afterok questions-train.gate r2-generate.gate
send r2-judge.gate r2-judge 0 gate afterany r2-judge
send r2-score r2-score 0 work afterok questions-train.gate r2-generate.gate r2-judge.gate
send r2-score.gate r2-score 0 gate afterany r2-score
send r2-pairs r2-pairs 0 work afterok questions-train.gate r2-generate.gate r2-judge.gate r2-score.gate
send r2-pairs.gate r2-pairs 0 gate afterany r2-pairs
send r2-reference r2-reference 0 work afterok r2-pairs.gate r1-dpo.gate
send r2-reference.gate r2-reference 0 gate afterany r2-reference
send dpo-pairs dpo-pairs 0 work afterok questions-train.gate r1-generate.gate r1-judge.gate r1-score.gate r1-pairs.gate r2-pairs.gate
send dpo-pairs.gate dpo-pairs 0 gate afterany dpo-pairs
send r2-dpo r2-dpo 0 work afterok r2-reference.gate r1-dpo.gate
send r2-dpo.gate r2-dpo 0 gate afterany r2-dpo
send dpo-reference dpo-reference 0 work afterok dpo-pairs.gate sft-reasoning.gate
send dpo-reference.gate dpo-reference 0 gate afterany dpo-reference
send eval-iterative-dpo eval-iterative-dpo 0 work afterok questions-test.gate r2-dpo.gate sft-summary.gate
send eval-iterative-dpo.gate eval-iterative-dpo 0 gate afterany eval-iterative-dpo
send dpo-train dpo-train 0 work afterok dpo-reference.gate sft-reasoning.gate
send dpo-train.gate dpo-train 0 gate afterany dpo-train
send eval-dpo eval-dpo 0 work afterok questions-test.gate dpo-train.gate sft-summary.gate
send eval-dpo.gate eval-dpo 0 gate afterany eval-dpo
send results results 0 work afterok questions-train.gate r0-generate.gate r0-judge.gate r0-score.gate questions-test.gate eval-base.gate eval-base-reasoning.gate set-direct.gate sft-direct.gate eval-direct-sft.gate set-multi-turn.gate sft-multi-turn.gate eval-multi-turn.gate set-summary.gate sft-summary.gate eval-summary-only.gate set-reasoning.gate sft-reasoning.gate eval-multi-agent.gate r1-generate.gate r1-judge.gate r1-score.gate r1-pairs.gate r1-reference.gate r1-dpo.gate r2-generate.gate r2-judge.gate r2-score.gate r2-pairs.gate r2-reference.gate r2-dpo.gate dpo-pairs.gate dpo-reference.gate dpo-train.gate eval-dpo.gate eval-iterative-dpo.gate eval-judge-card.gate
send results.gate results 0 gate afterany results
send report report 0 work afterok results.gate
send report.gate report 0 gate afterany report
