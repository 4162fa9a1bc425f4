"""The readable form of ``results/scheduling.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from origin import told

_ROWS = {
    "submission_seconds": "submission, s",
    "jobs_submitted": "jobs submitted",
    "calls_at_submission": "calls to the controller until submission returns",
    "calls_all": "calls to the controller, whole run",
    "calls_user": "of these by the user and the jobs",
    "first_shard_after": "first shard, s after the submission began",
    "all_shards_after": "last shard, s",
    "known_complete_after": "known to be complete, s",
    "shards_a_second": "shards a second, first to last",
    "overhead_ms_a_shard": "overhead a shard (worker time, first to last shard), ms",
    "allocated_ms_a_shard": "allocated core time a shard, starts and gates included, ms",
    "processor_ms_a_shard": "processor time a shard, all jobs, ms",
}
_KILLED = {
    "noticed": "noticed",
    "submitted_again": "submitted again",
    "done_again": "its shard done again",
    "all_done": "all shards done (since submission)",
}


def write(path: Path) -> str:
    """Writes the tables beside the results and returns them."""
    found = json.loads(path.read_text())
    lines = ["# What scheduling costs", ""]
    if "cluster" in found:
        lines += [*_cluster(found["cluster"]), ""]
    if "claims" in found:
        lines += [*_claims(found["claims"]), ""]
    text = "\n".join(lines)
    path.with_suffix(".md").write_text(text)
    return text


def _cluster(found: dict[str, Any]) -> Iterator[str]:
    shape, rounds = found["shape"], found["rounds"]
    yield f"## {shape['shards']:,} shards that do nothing, {shape['workers']} workers"
    yield ""
    yield (
        f"{told(found)} Slurm {found['slurm']}, {shape['nodes']} nodes on one machine, "
        f"load {found['load_before']} before and {found['load_after']} after; "
        f"datatrove {found['datatrove']}. One column a round; both systems take turns."
    )
    yield ""
    names = [(name, system) for system in ("ours", "datatrove") for name in range(len(rounds))]
    heads = [f"{'insightv-hpc' if s == 'ours' else s} {n + 1}" for n, s in names]
    yield f"| | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * len(heads)
    for key, text in _ROWS.items():
        values = [str(_value(rounds[n][system], key)) for n, system in names]
        yield f"| {text} | {' | '.join(values)} |"
    kill = found["kill_shape"]
    yield ""
    yield (
        f"A worker of {kill['workers']} killed by `kill -9` half through a shard of "
        f"{kill['seconds_a_shard']:g} s, {kill['shards']} shards in all; seconds since the kill:"
    )
    yield ""
    cases = found["killed"]
    yield f"| | {' | '.join(name.replace('ours', 'insightv-hpc') for name in cases)} |"
    yield "|---|" + "---:|" * len(cases)
    for key, text in _KILLED.items():
        yield f"| {text} | {' | '.join(str(case.get(key, '')) for case in cases.values())} |"
    steps = ["<br>".join(case["by_hand"]) or "nothing" for case in cases.values()]
    yield f"| what the user does | {' | '.join(steps)} |"


def _value(entry: dict[str, Any], key: str) -> Any:
    calls = {"calls_all": "all", "calls_user": "of_the_user"}
    return entry["calls"][calls[key]] if key in calls else entry[key]


def _claims(found: dict[str, Any]) -> Iterator[str]:
    shape = found["shape"]
    yield f"## {shape['shards']:,} shards, {shape['workers']} worker processes, no Slurm"
    yield ""
    yield f"{told(found)} {found['file_system']}, load {found['load_before']} before."
    yield ""
    yield "| | |"
    yield "|---|---:|"
    rows = {
        "shards claimed, written and committed a second": found["shards_a_second"],
        "processor time a shard, ms": found["cpu_ms_a_shard"],
        "workers that got work": found["workers_that_got_work"],
        "shards of a worker, fewest to most": "–".join(
            map(str, found["fewest_and_most_of_a_worker"])
        ),
        "inputs worked on twice": found["keys_called_twice"],
        "inputs stored twice": found["keys_stored_twice"],
    }
    rows["metadata operations a shard, start of the workers included"] = found["operations_a_shard"]
    rows |= {f"— {name}": count for name, count in found["operations_by_name"].items()}
    for text, value in rows.items():
        yield f"| {text} | {value} |"
