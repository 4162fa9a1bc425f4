#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=2
#SBATCH --export=HOME,USER,LOGNAME,SHELL,LANG,PATH,PYTHONPATH,VIRTUAL_ENV,HF_HOME
#SBATCH --gpus-per-node=1
#SBATCH --job-name=iv-sft-multi-turn-a0
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=2G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=stages/sft-multi-turn/logs/a0-0.log
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --time=60

# setup
export PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1 HF_HUB_OFFLINE=1 HPC_LEASE_TTL=60 HPC_LINGER=60 HPC_STALL=1800 OMP_NUM_THREADS=2 MKL_NUM_THREADS=2
# Submitted from the run directory, under a name with the run's id; see chain.sh
run=$SLURM_SUBMIT_DIR
prefix=iv-$(cat "$run/slurm/id")
name=$prefix-sft-multi-turn-a0
log="$run/stages/sft-multi-turn/logs/a0-0.log"
image=  # none: the payload runs as it is
stage=sft-multi-turn attempt=0 role=work
ranks=1 nodes=1 cores=2 gpus=1 minutes=60
requeues=100 patience=600
payload=(insightv work "$run" sft-multi-turn)

# command
# This runs the payload, does what its exit status asks, and exits. It is read again only
# where a node cannot see it yet.
for pause in 0 5 20 60; do sleep $pause; . "$run/slurm/host-27d8621d5e15/work.sh"; done
