#!/bin/bash

# Parameters
#SBATCH --array=0-1
#SBATCH --cpus-per-task=1
#SBATCH --export=HOME,USER,LOGNAME,SHELL,LANG,PATH,PYTHONPATH,VIRTUAL_ENV,HF_HOME
#SBATCH --gpus-per-node=1
#SBATCH --job-name=iv-r0-generate-a0
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=1800M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=stages/r0-generate/logs/a0-%a.log
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --time=30

# setup
export PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1 HF_HUB_OFFLINE=1 HPC_LEASE_TTL=60 HPC_LINGER=60 HPC_STALL=1800 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Submitted from the run directory, under a name with the run's id; see chain.sh
run=$SLURM_SUBMIT_DIR
prefix=iv-$(cat "$run/slurm/id")
name=$prefix-r0-generate-a0
log="$run/stages/r0-generate/logs/a0-*.log"
image=  # none: the payload runs as it is
stage=r0-generate attempt=0 role=work
ranks=1 nodes=1 cores=1 gpus=1 minutes=30
requeues=100 patience=600
payload=(insightv work "$run" r0-generate)

# command
# This runs the payload, does what its exit status asks, and exits. It is read again only
# where a node cannot see it yet.
for pause in 0 5 20 60; do sleep $pause; . "$run/slurm/host-27d8621d5e15/work.sh"; done
