"""Claims per second, doubles and metadata operations of many workers on one stage.

No scheduler, and by default a file system in memory: what is measured is the protocol. A real
file system adds its latency times the operations counted here. Called by ``scheduling.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from noop import Shape, calls_folder, prepare, reopen

from hpc import gates
from hpc.executors.base import Job
from hpc.executors.local import LocalExecutor
from hpc.shards import read_groups, shard_path, sidecars


def drive(run: Path, workers: int) -> dict[str, Any]:
    """Lets that many worker processes finish the stage, and checks what they did."""
    chain = reopen(run)
    gates.prepare(chain, "copy")
    command = (*chain.command, "work", str(run), "copy")
    executor = LocalExecutor(preload=("hpc.control", "hpc.submission"))
    begun = time.time()
    try:
        job = Job("copy", command, chain.run.logs("copy"), count=workers)
        handle = executor.submit(job)
        while (state := executor.state(handle)).running:
            time.sleep(0.2)
    finally:
        executor.close()
    assert all(status == 0 for status, _ in state.ended), state.ended
    return account(run) | {"seconds": round(time.time() - begun, 1)}


def account(run: Path) -> dict[str, Any]:
    """What the workers tell they did, held against the shards there are."""
    chain = reopen(run)
    told = [json.loads(path.read_text()) for path in calls_folder(run).glob("*.json")]
    times = [moment for worker in told for moment, _ in worker["calls"]]
    asked_for = sum((Counter(worker["operations"]) for worker in told), Counter[str]())
    calls = Counter(key for worker in told for _, key in worker["calls"])
    folder = chain.run.shards("copy")
    made = sidecars(folder)
    stored = Counter(key for index in made for key, _ in read_groups(shard_path(folder, index)))
    asked = sidecars(chain.run.shards("questions"))
    assert len(made) == len(asked) and stored.total() == sum(s.inputs for s in asked.values())
    return {
        "shards": len(made),
        "workers_that_got_work": len(told),
        "fewest_and_most_of_a_worker": [f(len(w["calls"]) for w in told) for f in (min, max)],
        "shards_a_second": round(len(made) / (max(times) - min(times)), 1),
        "cpu_ms_a_shard": round(1000 * sum(w["cpu"] for w in told) / len(made), 2),
        "keys_called_twice": calls.total() - len(calls),
        "keys_stored_twice": stored.total() - len(stored),
        "operations_a_shard": round(asked_for.total() / len(made), 1),
        "operations_by_name": {
            name: round(count / len(made), 2) for name, count in asked_for.most_common()
        },
        "leases_left": len(list(chain.run.leases("copy").iterdir())),
    }


def measure(folder: Path, shards: int, workers: int) -> dict[str, Any]:
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True)
    result: dict[str, Any] = {
        "shape": {"shards": shards, "workers": workers},
        "file_system": kind.stdout.strip(),
        "load_before": round(os.getloadavg()[0], 1),
    }
    run = folder / "run"
    prepare(run, Shape(shards, workers=workers))
    result |= drive(run, workers)
    shutil.rmtree(run)
    return result
