#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --export=HOME,USER,LOGNAME,SHELL,LANG,PATH,PYTHONPATH,VIRTUAL_ENV,HF_HOME
#SBATCH --job-name=iv-sft-direct.gate-a0
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=500M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x.log
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=B:USR1@1
#SBATCH --time=10

# setup
export PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1 HF_HUB_OFFLINE=1 HPC_LEASE_TTL=60 HPC_LINGER=60 HPC_STALL=1800 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Submitted from the run directory, under a name with the run's id; see chain.sh
run=$SLURM_SUBMIT_DIR
prefix=iv-$(cat "$run/slurm/id")
name=$prefix-sft-direct.gate-a0
log="$run/slurm/logs/$name.log"
image=  # none: the payload runs as it is
stage=sft-direct attempt=0 role=gate
ranks=1 nodes=1 cores=1 gpus=0 minutes=10
requeues=100 patience=600
exported=(HOME USER LOGNAME SHELL LANG PATH PYTHONPATH VIRTUAL_ENV HF_HOME)
notify='' accounts=()
# If shards are missing: what this gate submits, and who waits for that.
next_work=$prefix-sft-direct-a1
next_gate=$prefix-sft-direct.gate-a1
dependents=("eval-direct-sft questions-test sft-direct" "results questions-train r0-generate r0-judge r0-score questions-test eval-base eval-base-reasoning set-direct sft-direct eval-direct-sft set-multi-turn sft-multi-turn eval-multi-turn set-summary sft-summary eval-summary-only set-reasoning sft-reasoning eval-multi-agent r1-generate r1-judge r1-score r1-pairs r1-reference r1-dpo r2-generate r2-judge r2-score r2-pairs r2-reference r2-dpo dpo-pairs dpo-reference dpo-train eval-dpo eval-iterative-dpo eval-judge-card")
payload=(insightv gate "$run" sft-direct 0 0)

# command
# This runs the payload, does what its exit status asks, and exits. It is read again only
# where a node cannot see it yet.
for pause in 0 5 20 60; do sleep $pause; . "$run/slurm/host-27d8621d5e15/gate.sh"; done
