"""How a run's batch jobs are named, which is how they are found again."""

from __future__ import annotations

import re
import uuid

from hpc.disk import make_folder, write_atomic
from hpc.rundir import RunDir

_JOB = re.compile(r"(?P<stage>.+?)(?P<gate>\.gate)?-a(?P<attempt>\d+)")


def run_id(run: RunDir) -> str:
    """Eight hex digits that are this run's alone; ``new`` until `make_id` drew them."""
    try:
        return (run.path / "slurm" / "id").read_text().strip()
    except FileNotFoundError:
        return "new"


def make_id(run: RunDir) -> str:
    """Draws the run's id, unless it has one.

    Only the path would not do: jobs of a run that was deleted may still be remembered.
    """
    path = make_folder(run.path / "slurm") / "id"
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:8] + "\n")
    return run_id(run)


def prefix(run: RunDir) -> str:
    """What the names of all the run's jobs begin with, without the dash."""
    return f"iv-{run_id(run)}"


def work_name(run: RunDir, stage: str, attempt: int) -> str:
    """A stage's workers."""
    return f"{prefix(run)}-{stage}-a{attempt}"


def gate_name(run: RunDir, stage: str, attempt: int) -> str:
    """A stage's gate."""
    return f"{prefix(run)}-{stage}.gate-a{attempt}"


def parse_name(run: RunDir, name: str) -> tuple[str, str, int] | None:
    """Stage, role and attempt of a job's name; None for another run's."""
    start = f"{prefix(run)}-"
    match = _JOB.fullmatch(name[len(start) :]) if name.startswith(start) else None
    if match is None:
        return None
    role = "gate" if match["gate"] else "work"
    return match["stage"], role, int(match["attempt"])


def next_attempt(run: RunDir, stage: str) -> int:
    """Attempts go on counting where an earlier submission, or a run here, stopped."""
    numbers = [-1]
    for entry in run.read_jobs():
        if entry.get("stage") == stage and isinstance(entry.get("attempt"), int):
            numbers.append(entry["attempt"])
    return max(numbers) + 1
