"""What a run has used: from the notes of its jobs, and from Slurm's accounts where it keeps any.

A job notes when it begins and when it ends. One that was killed left no end: then Slurm's
accounts tell, and without them it counts until somebody looked next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpc.naming import parse_name
from hpc.rundir import RunDir
from hpc.slurm import Spent

Note = Mapping[str, Any]


def spent(notes: Sequence[Note], accounts: Iterable[Spent] | None, now: float) -> list[Spent]:
    """What each start of each job, or of an array's element, has used; each is counted once.

    Args:
        notes: The lines of ``jobs.jsonl``.
        accounts: What sacct told, starts before a requeue included; None where there is none.
        now: Seconds since the epoch: the last look there was.
    """
    told: dict[str, list[Spent]] = defaultdict(list)
    for row in sorted(accounts or (), key=lambda row: row.start):
        told[row.job].append(row)
    starts: dict[str, dict[int, Note]] = defaultdict(dict)  # an end takes its beginning's place
    for note in notes:
        if note.get("event") in ("began", "ended"):
            starts[note["job"]][int(note.get("restart", 0))] = note
    found = []
    for job in {**told, **starts}:
        rows = dict(enumerate(told.get(job, ())))
        for restart, note in starts.get(job, {}).items():
            known = rows.pop(restart) if restart in rows else None
            if note["event"] == "ended":
                found.append(_noted(note, float(note["seconds"])))
            else:
                found.append(known or _noted(note, _until_a_look(note, notes, now)))
        found += rows.values()
    return found


def totals(used: Iterable[Spent]) -> dict[str, float]:
    """Node-, core- and GPU-hours."""
    hours = {"node": 0.0, "core": 0.0, "gpu": 0.0}
    for item in used:
        for key, count in (("node", item.nodes), ("core", item.cores), ("gpu", item.gpus)):
            hours[key] += item.seconds * count / 3600
    return hours


def by_stage(run: RunDir, used: Iterable[Spent]) -> dict[str, dict[str, float]]:
    """Node-, core- and GPU-hours of each stage's jobs, its gates' included."""
    found: dict[str, list[Spent]] = defaultdict(list)
    for item in used:
        if parsed := parse_name(run, item.name):
            found[parsed[0]].append(item)
    return {stage: totals(items) for stage, items in found.items()}


def _until_a_look(begun: Note, notes: Sequence[Note], now: float) -> float:
    """Seconds from a start to the first sign that it was over, at most its time limit.

    Signs are the job's next start, its stage's gate at work, and a later attempt.
    """
    looks = [now]
    for note in notes:
        if note.get("stage") != begun["stage"] or note["time"] < begun["time"]:
            continue
        again = note["job"] == begun["job"] and int(note.get("restart", 0)) > begun["restart"]
        gate = note["role"] == "gate" != begun["role"] and note["event"] != "submitted"
        if again or gate or int(note["attempt"]) > begun["attempt"]:
            looks.append(float(note["time"]))
    return max(0.0, min(min(looks) - begun["time"], 60.0 * begun["minutes"]))


def _noted(note: Note, seconds: float) -> Spent:
    return Spent(
        job=note["job"],
        name=note["name"],
        state="",
        start=str(note["time"]),
        seconds=seconds,
        nodes=int(note.get("nodes", 1)),
        cores=int(note.get("cores", 0)),
        gpus=int(note.get("gpus", 0)),
    )
