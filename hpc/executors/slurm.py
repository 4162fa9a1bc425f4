"""Jobs as batch jobs of a Slurm cluster."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from hpc import slurm
from hpc.cluster import Profile, Resources
from hpc.disk import make_folder, write_atomic
from hpc.executors.base import Job, State
from hpc.executors.batch import Retry, script_path, text
from hpc.naming import work_name
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
        self.keep: tuple[int, ...] = ()
        self._names: dict[str, Job] = {}
        self._earliest = 0.0

    def write(self, job: Job, resources: Resources, retry: Retry | None = None) -> Path:
        """Writes a job's script."""
        path = script_path(self.run, job.name)
        make_folder(path.parent / "logs")
        write_atomic(path, text(self.run, job, self.profile, resources, retry))
        return path

    def send(self, job: Job, look: bool = False) -> str:
        """Submits a job whose script is written, and records it.

        Args:
            job: The job.
            look: Whether a job of this name may have come into being before.

        Raises:
            UserError: Slurm refuses it, or stays away.
        """
        make_folder(job.logs)
        time.sleep(max(0.0, self._earliest - time.monotonic()))
        self._earliest = time.monotonic() + 1.0 / self.profile.submit.per_second
        path = script_path(self.run, job.name)
        patience = self.profile.submit.patience
        handle = slurm.submit(path, job.name, self.profile.export, patience, look)
        self.run.add_job(
            event="submitted",
            name=job.name,
            job=handle,
            stage=job.stage,
            attempt=job.attempt,
            role=job.role,
        )
        self._names[handle] = job
        return handle

    def submit(self, job: Job) -> str:
        """Writes a job's script and submits it; without a name, the one of its attempt."""
        if not job.name:
            name = work_name(self.run, job.stage, job.attempt)
            job = replace(job, name=name, array=job.count > 1)
        kinds = {"cpu": self.profile.cpu, "gpu": self.profile.gpu}
        self.write(job, self.profile.stages.get(job.stage) or kinds[job.resources])
        return self.send(job)

    def state(self, handle: str) -> State:
        """How far a job is, in one call of squeue and, once it has left the queue, one of sacct."""
        job = self._names[handle]
        lines = [line for line in slurm.queue(job.name) if line.job == handle]
        running = sum(line.count for line in lines)
        if running:
            return State(running=running, processes=(int(handle),))
        logs = job.logs / f"a{job.attempt}-0.log"
        ends = [
            (entry["status"], logs)
            for entry in self.run.read_jobs()
            if entry.get("event") == "ended" and entry["job"].partition("_")[0] == handle
        ]
        return State(running=0, ended=tuple(ends), processes=(int(handle),))

    def cancel(self, handle: str, kill: bool = False) -> None:
        """Asks a job's processes to save and leave; with ``kill`` ends them at once."""
        slurm.cancel([handle], kill, self.profile.submit.patience)

    def close(self) -> None:
        """Nothing is held; what was submitted goes on."""
