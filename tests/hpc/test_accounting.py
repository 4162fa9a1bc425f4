"""What a run has used, from what its jobs noted and what sacct tells."""

from __future__ import annotations

from typing import Any

import pytest

from hpc.accounting import spent, totals
from hpc.slurm import Spent, read_accounts


def note(event: str, time: float, job: str = "7_0", **more: Any) -> dict[str, Any]:
    usual = {"name": "iv-x-double-a0", "stage": "double", "attempt": 0, "role": "work"}
    counts = {"restart": 0, "nodes": 1, "cores": 4, "gpus": 2, "minutes": 60}
    return {"time": time, "event": event, "job": job, **usual, **counts, **more}


def row(seconds: float, start: str, job: str = "7_0", gpus: int = 2) -> Spent:
    return Spent(job, "iv-x-double-a0", "FAILED", start, seconds, 1, 4, gpus)


def gpu_seconds(notes: list[dict[str, Any]], accounts: list[Spent] | None, now: float) -> float:
    return totals(spent(notes, accounts, now))["gpu"] * 3600


def test_an_end_that_was_noted_counts_as_noted() -> None:
    notes = [note("began", 100), note("ended", 150, seconds=49)]
    assert gpu_seconds(notes, None, 900) == pytest.approx(98)
    assert gpu_seconds(notes, [row(50, "2026-01-01T00:00:00")], 900) == pytest.approx(98)


def test_a_killed_job_counts_by_sacct_else_until_somebody_looked() -> None:
    notes = [note("began", 100)]
    assert gpu_seconds(notes, None, 160) == pytest.approx(120)
    assert gpu_seconds(notes, [row(7, "2026-01-01T00:00:00")], 160) == pytest.approx(14)
    gate = note("began", 130, "9", name="iv-x-double.gate-a0", role="gate", gpus=0)
    assert gpu_seconds([*notes, gate], None, 500) == pytest.approx(60)
    assert gpu_seconds(notes, None, 1e9) == pytest.approx(2 * 3600)  # its time limit


def test_every_start_of_a_requeued_job_counts_once() -> None:
    first, second = note("began", 100), note("began", 140, restart=1)
    notes = [first, second, note("ended", 150, restart=1, seconds=10)]
    assert gpu_seconds(notes, None, 900) == pytest.approx(2 * (40 + 10))
    rows = [row(10, "2026-01-01T00:01:00"), row(30, "2026-01-01T00:00:00")]
    assert gpu_seconds(notes, rows, 900) == pytest.approx(2 * (30 + 10))


def test_what_never_noted_anything_counts_by_sacct() -> None:
    assert gpu_seconds([], [row(30, "2026-01-01T00:00:00", "8")], 900) == pytest.approx(60)
    other = {"time": 1.0, "event": "submitted", "job": "8", "stage": "double"}
    assert spent([other], None, 900) == []


def test_what_sacct_prints() -> None:
    said = (
        "7_0|iv-x-double-a0|NODE_FAIL|2026-01-01T00:00:00|30|billing=4,cpu=4,gres/gpu=2,node=1\n"
        "7_[1-3]|iv-x-double-a0|CANCELLED by 5|None|0|\n"
    )
    assert read_accounts(said) == [
        Spent("7_0", "iv-x-double-a0", "NODE_FAIL", "2026-01-01T00:00:00", 30, 1, 4, 2),
        Spent("7_[1-3]", "iv-x-double-a0", "CANCELLED", "None", 0, 0, 0, 0),
    ]
