"""Jobs as batch jobs of a Slurm cluster."""

from __future__ import annotations

import time
from pathlib import Path

from hpc import slurm
from hpc.cluster import Profile, Resources
from hpc.disk import make_folder, write_atomic
from hpc.executors.base import Job
from hpc.executors.batch import Retry, script_path, text, write_host
from hpc.rundir import RunDir


class SlurmExecutor:
    """Submits jobs to Slurm, each once and not too fast; a job's handle is its id.

    Every id stands in the run's ``jobs.jsonl`` before the next job is submitted.

    Args:
        run: The run directory.
        profile: The cluster.
    """

    def __init__(self, run: RunDir, profile: Profile) -> None:
        self.run, self.profile = run, profile
        self._earliest = 0.0

    def write(self, job: Job, resources: Resources, retry: Retry | None = None) -> Path:
        """Writes a job's script, and the bash that it reads."""
        path = script_path(self.run, job.name)
        make_folder(path.parent / "logs")
        write_host(path.parent)
        write_atomic(path, text(self.run, job, self.profile, resources, retry))
        return path

    def send(self, job: Job) -> str:
        """Submits a job whose script is written, and records it.

        Raises:
            UserError: Slurm refuses it, or stays away.
        """
        make_folder(job.logs)
        time.sleep(max(0.0, self._earliest - time.monotonic()))
        self._earliest = time.monotonic() + 1.0 / self.profile.submit.per_second
        path = script_path(self.run, job.name)
        patience = self.profile.submit.patience
        handle = slurm.submit(path, job.name, self.profile.export, patience)
        self.run.add_job(
            event="submitted",
            name=job.name,
            job=handle,
            stage=job.stage,
            attempt=job.attempt,
            role=job.role,
        )
        return handle
