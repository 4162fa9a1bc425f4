"""What scheduling costs: the same map of shards that do nothing, here and with datatrove.

On the test cluster, in one run and at equal workers: submission, calls to the controller,
overhead a shard, and the time until a killed worker's shard is done again. datatrove's Slurm
executor is tuned: as many tasks a job as give every worker one job. Then, without Slurm, what
many worker processes cost each other (`claims`).

    python benchmarks/scheduling.py cluster --datatrove /path/to/venv/bin/python
    python benchmarks/scheduling.py claims
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import claims  # noqa: E402
from noop import Shape, prepare  # noqa: E402
from origin import origin  # noqa: E402
from scheduling_table import write  # noqa: E402

from hpc.cluster import Profile, Resources  # noqa: E402
from hpc.config import dump  # noqa: E402
from hpc.leases import Leases, Owner  # noqa: E402
from hpc.rundir import CANCELLED, STOPPED, read_json, write_json  # noqa: E402
from hpc.shards import shard_path, sidecar_path  # noqa: E402
from tests.cluster.testbed import USER, Settings, Testbed  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "scheduling.json"
HERE = Path(__file__).resolve().parent
# Left out: what daemons say to each other whether or not somebody submits; this program's own.
_DAEMONS = {"MESSAGE_NODE_REGISTRATION_STATUS", "REQUEST_PING", "ACCOUNTING_UPDATE_MSG"}
_MINE = {"REQUEST_STATS_INFO"}


class Ours:
    """The chain's map stage, its input made beforehand, submitted by its own command."""

    name = "insightv-hpc"

    def __init__(self, cluster: Testbed, shape: Shape, cores: int = 1) -> None:
        self.cluster, self.shape = cluster, shape
        self.folder = cluster.folder("ours")
        self.run = self.folder / "run"
        self.chain = prepare(self.run, shape)
        profile = Profile(partition="batch")
        profile.cpu = Resources(memory="1G", minutes=30, workers=shape.workers, cores=cores)
        (self.folder / "profile.yaml").write_text(dump(profile))
        own(cluster, self.folder)
        self.shards = self.chain.run.shards("copy")

    def submit(self) -> float:
        begun = time.time()
        words = [sys.executable, HERE / "noop.py", "submit", self.run]
        self.cluster.run(*words, self.folder / "profile.yaml", timeout=600)
        return time.time() - begun

    def done(self) -> dict[int, float]:
        """When each shard was finished."""
        return moments(self.shards, r"(\d+)\.json")

    def over(self) -> bool:
        """Whether the chain knows that it is complete, and the gate has said its last word."""
        for marker in (STOPPED, CANCELLED):
            assert (said := self.chain.run.marked(marker)) is None, said
        ends = [e for e in self.chain.run.read_jobs() if e.get("event") == "ended"]
        return any((e["role"], e["status"]) == ("gate", 0) for e in ends)

    def at_work(self) -> dict[int, Owner]:
        return Leases(self.chain.run.leases("copy")).owners()

    def process(self, owner: Owner) -> int:
        """The id, on this machine, of a process that a node knows under another."""
        space = owner.place.partition(" ")[2]
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and str((entry / "ns" / "pid").readlink()) == space:
                    status = (entry / "status").read_text()
                    if int(re.findall(r"NSpid:.*\s(\d+)\n", status)[0]) == owner.pid:
                        return int(entry.name)
            except OSError:
                continue
        raise LookupError(owner)

    def kill_one(self, after: float) -> tuple[int, float]:
        """Kills a worker in the middle of a shard of the second round; which, and when."""
        wait_for(lambda: len(self.done()) >= self.shape.workers)
        before = set(self.at_work()) | set(self.done())
        wait_for(lambda: set(self.at_work()) - before)
        index, owner = next(item for item in self.at_work().items() if item[0] not in before)
        process = self.process(owner)
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
        return index, time.time()

    def redo(self, index: int, killed: float) -> dict[str, Any]:
        """Nobody does anything."""
        later = self.chain.run.leases("copy") / f"{index:05d}.1"
        wait_for(lambda: later.exists() or sidecar_path(shard_path(self.shards, index)).exists())
        return {"noticed": round(time.time() - killed, 1), "by_hand": []}


class Datatrove:
    """The same with datatrove's Slurm executor; its input has the same rows in as many files."""

    name = "datatrove"

    def __init__(self, cluster: Testbed, shape: Shape, python: Path) -> None:
        self.cluster, self.shape = cluster, shape
        self.folder = cluster.folder("datatrove")
        per_job = -(-shape.shards // shape.workers)
        self.words: list[str | Path] = [python, HERE / "datatrove_map.py", self.folder]
        for name, value in (("tasks", shape.shards), ("workers", shape.workers)):
            self.words += [f"--{name}", str(value)]
        self.words += ["--per-job", str(per_job), "--keys", str(shape.keys)]
        self.words += ["--pause", str(shape.pause)]
        self.per_job, self.submitted, self.version = per_job, list[str](), ""
        cluster.run(*self.words, "--make", timeout=600)

    def submit(self) -> float:
        begun = time.time()
        path = f"{Path(self.words[0]).parent}:/usr/bin:/bin"
        said = self.cluster.run(*self.words, env={"PATH": path}, timeout=600).stdout
        told = json.loads(said.splitlines()[-1])
        self.submitted.append(told["job"])
        self.version = told["version"]
        return time.time() - begun

    def done(self) -> dict[int, float]:
        return moments(self.folder / "logs" / "completions", r"(\d+)")

    def over(self) -> bool:
        """Whether its statistics are merged, which is its last job."""
        return (self.folder / "logs" / "stats.json").exists()

    def kill_one(self, after: float) -> tuple[int, float]:
        wait_for(lambda: len(self.done()) >= self.shape.workers)
        before = set(self.done())
        wait_for(lambda: set(self.done()) - before)
        job = min(set(self.done()) - before) // self.per_job
        time.sleep(after)
        mine = range(job * self.per_job, (job + 1) * self.per_job)
        index = min(set(mine) - set(self.done()))
        os.kill(self._process(job), signal.SIGKILL)
        return index, time.time()

    def _process(self, element: int) -> int:
        wanted = [f"SLURM_ARRAY_TASK_ID={element}", f"SLURM_ARRAY_JOB_ID={self.submitted[-1]}"]
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_text().split("\0")
                if not any(word.endswith("launch_pickled_pipeline") for word in words[:2]):
                    continue
                if set(wanted) <= set((entry / "environ").read_text().split("\0")):
                    return int(entry.name)
            except OSError:
                continue
        raise LookupError(element)

    def redo(self, index: int, killed: float) -> dict[str, Any]:
        """A user who watches all the time: waits for the other jobs, and submits again.

        Not earlier: what still runs would be run a second time beside itself.
        """
        queue = ["squeue", "--me", "-h", "-o", "%F %T %r"]

        def jobs() -> list[list[str]]:
            lines = self.cluster.run(*queue).stdout.splitlines()
            return [line.split() for line in lines]

        noticed = 0.0

        def ended() -> bool:
            nonlocal noticed
            failed = ["sacct", "-X", "-n", "-j", self.submitted[-1], "-o", "State"]
            if not noticed and "FAILED" in self.cluster.run(*failed).stdout:
                noticed = time.time() - killed
            return not any(job[0] == self.submitted[-1] for job in jobs())

        wait_for(ended, pause=1.0)
        left = [" ".join(job[1:]) for job in jobs()]
        self.cluster.run("scancel", "--user", USER)
        again = time.time() - killed
        self.submit()
        return {
            "noticed": round(noticed, 1),
            "submitted_again": round(again, 1),
            "by_hand": ["sees FAILED", "waits until the other jobs have ended", "cancels the "
                        f"job that waits for ever ({'; '.join(left)})", "runs the script again"],
        }  # fmt: skip


def own(cluster: Testbed, folder: Path) -> None:
    """Gives a folder to the unprivileged user."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, cluster.settings.uid, cluster.settings.uid)


def moments(folder: Path, name: str) -> dict[int, float]:
    """The time of each file of that name, by its number."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(name, path.name):
            found[int(match[1])] = path.stat().st_mtime
    return found


def wait_for(good: Callable[[], Any], seconds: float = 900.0, pause: float = 0.1) -> None:
    give_up = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(pause)


def calls(cluster: Testbed) -> dict[str, Any]:
    """What the controller was asked since the counters were set back."""
    said = cluster.admin("sdiag").stdout
    kinds, _, users = said.partition("Remote Procedure Call statistics by user")
    kinds = kinds.partition("Remote Procedure Call statistics by message type")[2]

    def counts(text: str) -> dict[str, int]:
        found = re.findall(r"^\s*(\S+)\s*\(\s*\d+\)\s*count:(\d+)", text, re.MULTILINE)
        return {name: int(count) for name, count in found}

    by_kind = {name: n for name, n in counts(kinds).items() if name not in _DAEMONS | _MINE}
    mine = counts(users.partition("Pending RPC")[0]).get(USER, 0)
    return {"all": sum(by_kind.values()), "of_the_user": mine, "by_kind": by_kind}


def spent(cluster: Testbed, begun: float) -> dict[str, float]:
    """Seconds of processor and of allocation, all of the user's jobs since then together."""
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(begun))
    ask = ["sacct", "-n", "-P", "-S", since, "-o", "JobID,ElapsedRaw,TotalCPU"]
    lines = [line.split("|") for line in cluster.run(*ask).stdout.splitlines()]
    whole = [line for line in lines if "." not in line[0]]
    clocks = [line[2].replace("-", ":").split(":") for line in whole]
    processor = sum(
        sum(float(part) * 60**at for at, part in enumerate(reversed(clock))) for clock in clocks
    )
    return {"allocated": sum(float(line[1]) for line in whole), "processor": round(processor, 1)}


def through(system: Ours | Datatrove) -> dict[str, Any]:
    """Submits the map and follows it to its end, asking the controller nothing meanwhile."""
    cluster, count = system.cluster, system.shape.shards
    cluster.admin("sdiag", "--reset")
    begun = time.time()
    submission = system.submit()
    submitted = calls(cluster)
    wait_for(system.over, pause=1.0)
    known = time.time()
    time.sleep(3)  # the last job's own end
    asked = calls(cluster)
    done = sorted(system.done().values())
    assert len(done) == count, len(done)
    wait_for(lambda: not cluster.run("squeue", "--me", "-h").stdout.strip(), pause=1.0)
    time.sleep(3)  # accounting is told last
    used = spent(cluster, begun)
    result = {
        "submission_seconds": round(submission, 2),
        "jobs_submitted": submitted["by_kind"].get("REQUEST_SUBMIT_BATCH_JOB", 0),
        "calls_at_submission": submitted["all"],
        "calls": asked,
        "first_shard_after": round(done[0] - begun, 1),
        "all_shards_after": round(done[-1] - begun, 1),
        "known_complete_after": round(known - begun, 1),
        "shards_a_second": round((count - 1) / (done[-1] - done[0]), 1),
        "overhead_ms_a_shard": round(
            1000 * (done[-1] - done[0]) * system.shape.workers / (count - 1), 1
        ),
        "allocated_ms_a_shard": round(1000 * used["allocated"] / count, 1),
        "processor_ms_a_shard": round(1000 * used["processor"] / count, 1),
    }
    print(system.name, json.dumps(result), flush=True)
    return result


def killed(system: Ours | Datatrove) -> dict[str, Any]:
    """A worker dies by kill -9 half through a shard; when is that shard done after all?"""
    begun = time.time()
    system.submit()
    index, moment = system.kill_one(system.shape.pause / 2)
    told = system.redo(index, moment)
    wait_for(lambda: index in system.done())
    again = system.done()[index] - moment
    wait_for(lambda: len(system.done()) == system.shape.shards)
    whole = max(system.done().values()) - begun
    result = {**told, "done_again": round(again, 1), "all_done": round(whole, 1)}
    wait_for(system.over)
    print(system.name, json.dumps(result), flush=True)
    return result


def on_cluster(words: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    cluster = Testbed()
    cluster.up(cluster.settings if cluster.running() else Settings())
    cluster.reset()
    shape = Shape(words.shards, workers=words.workers)
    slow = Shape(4 * 8, pause=words.pause, workers=8)
    alone = Shape(4 * 4, pause=words.pause, workers=4)
    result: dict[str, Any] = {
        "shape": {"shards": shape.shards, "workers": shape.workers, "nodes": 4},
        "kill_shape": {"shards": slow.shards, "workers": 8, "seconds_a_shard": words.pause},
        "load_before": round(os.getloadavg()[0], 1),
        "slurm": cluster.admin("sinfo", "--version").stdout.split()[-1],
    }
    try:
        # One after the other, and again: what the machine does beside this falls on both.
        rounds: list[dict[str, Any]] = []
        result |= {"rounds": rounds, "killed": {}}
        for _ in range(words.rounds):
            ours = through(Ours(cluster, shape))
            other = Datatrove(cluster, shape, words.datatrove)
            rounds.append({"ours": ours, "datatrove": through(other)})
            result |= {"datatrove": other.version, "load_after": round(os.getloadavg()[0], 1)}
            save(result)
        cases = {
            "ours": Ours(cluster, slow),
            "ours, no other worker on its node": Ours(cluster, alone, cores=8),
            "datatrove": Datatrove(cluster, slow, words.datatrove),
        }
        for name, system in cases.items():
            result["killed"][name] = killed(system)
            save(result)
    finally:
        cluster.reset()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cluster", "claims"])
    parser.add_argument("--shards", type=int, help="2,000 on the cluster, 10,000 for claims")
    parser.add_argument("--workers", type=int, help="16 on the cluster, 256 for claims")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pause", type=float, default=5.0, help="of a shard, where one is killed")
    parser.add_argument("--datatrove", type=Path, help="a Python that has it")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for claims")
    parser.add_argument("--out", type=Path, default=RESULTS)
    words = parser.parse_args()
    made_by = origin()

    def save(result: dict[str, Any]) -> None:
        write_json(words.out, (read_json(words.out) or {}) | {words.what: made_by | result})

    if words.what == "cluster":
        if words.datatrove is None:
            parser.error("--datatrove: give a Python that has datatrove and orjson")
        words.shards, words.workers = words.shards or 2000, words.workers or 16
        on_cluster(words, save)
    else:
        folder = Path(tempfile.mkdtemp(prefix="claims-", dir=words.folder))
        try:
            save(claims.measure(folder, words.shards or 10_000, words.workers or 256))
        finally:
            shutil.rmtree(folder)
    print(write(words.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
