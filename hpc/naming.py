"""How a run's batch jobs are named, which is how they are found again."""

from __future__ import annotations

import re
import uuid

from hpc.disk import make_folder
from hpc.rundir import RunDir

_JOB = re.compile(r"(?P<stage>.+?)(?P<gate>\.gate)?-a(?P<attempt>\d+)")


def run_id(run: RunDir) -> str:
    """Eight hex digits that are this run's alone; made when first asked for."""
    path = make_folder(run.path / "slurm") / "id"
    try:
        with path.open("x") as file:
            file.write(uuid.uuid4().hex[:8])
    except FileExistsError:
        pass
    return path.read_text().strip()


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
