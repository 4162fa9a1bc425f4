"""Claims per second, doubles and metadata operations of many workers on one stage.

No scheduler, and by default a file system in memory: what is measured is the protocol. A real
file system adds its latency times the operations counted here. Called by ``scheduling.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from noop import Shape, calls_folder, prepare, reopen

from hpc import gates
from hpc.executors.base import Job
from hpc.executors.local import LocalExecutor
from hpc.shards import read_groups, shard_path, sidecars

_TRACED = (
    "openat,open,creat,stat,lstat,newfstatat,statx,access,faccessat,faccessat2,readlink,"
    "mkdir,rmdir,link,linkat,unlink,unlinkat,rename,renameat,renameat2,getdents64,"
    "fsync,fdatasync,truncate,ftruncate,utimensat"
)
_CALL = re.compile(rb"\d+ +(\w+)\(")


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
        "leases_left": len(list(chain.run.leases("copy").iterdir())),
    }


def operations(run: Path, workers: int, shards: int) -> dict[str, Any]:
    """Counts the system calls on names in the run's folder, by strace."""
    log = run.with_name("strace")
    command = ["strace", "-f", "-y", "--seccomp-bpf", "-qq", "-s", "1", "-e", f"trace={_TRACED}"]
    command += ["-e", "signal=none", "-o", str(log), sys.executable, __file__, str(run)]
    subprocess.run([*command, str(workers)], check=True)
    inside = (str(run) + "/stages/").encode()
    found: Counter[str] = Counter()
    driver = None
    with log.open("rb") as lines:
        for line in lines:
            pid = line.split(b" ", 1)[0]
            driver = driver or pid
            if pid != driver and inside in line and (call := _CALL.match(line)):
                found[call[1].decode()] += 1
    log.unlink()
    each = {name: round(count / shards, 2) for name, count in found.most_common()}
    return {"a_shard": round(found.total() / shards, 1), "by_call_a_shard": each}


def measure(folder: Path, shards: int, workers: int) -> dict[str, Any]:
    shape = Shape(shards, workers=workers)
    timed, traced = folder / "timed", folder / "traced"
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True)
    result: dict[str, Any] = {
        "shape": {"shards": shards, "workers": workers},
        "file_system": kind.stdout.strip(),
        "load_before": round(os.getloadavg()[0], 1),
    }
    prepare(timed, shape)
    result |= drive(timed, workers)
    shutil.rmtree(timed)
    print(json.dumps(result), flush=True)
    if shutil.which("strace"):
        prepare(traced, shape)
        result["operations"] = operations(traced, workers, shards)
    else:
        result["operations"] = "not counted: there is no strace here"
    return result


if __name__ == "__main__":  # what is traced
    drive(Path(sys.argv[1]), int(sys.argv[2]))
