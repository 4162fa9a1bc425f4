"""Seeded faults throughout a chain on the test cluster, and what became of its records.

``python -m tests.cluster.chaos --seeds 3 4 --faults 100 --save``: the same seed draws the same
faults in the same order; when each one strikes depends on the machine. Prints which fault met which
stage, and the records that were expected, lost and doubled; status 1 if any was. With ``--save``
they are kept in ``benchmarks/results/chaos.json``, beside those of other seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from chains import PATIENCE, Run, profile, wait_for  # noqa: E402
from testbed import Settings, Testbed  # noqa: E402

from hpc import gates  # noqa: E402
from hpc.naming import prefix  # noqa: E402
from hpc.provenance import describe  # noqa: E402
from hpc.rundir import STOPPED  # noqa: E402
from hpc.shards import read_groups, shard_path, sidecars  # noqa: E402

Fault = Callable[["Chaos"], Any]
SAVED = Path(__file__).parents[2] / "benchmarks" / "results" / "chaos.json"


def _kill(chaos: Chaos) -> Any:
    return chaos.strike(signal.SIGKILL)


def _terminate(chaos: Chaos) -> Any:
    return chaos.strike(signal.SIGTERM)


def _pause(chaos: Chaos) -> Any:
    process = chaos.strike(signal.SIGSTOP)
    if process is not None:
        chaos.later(random.Random(process.pid).uniform(1, 15), process.send_signal, signal.SIGCONT)
    return process


def _element(chaos: Chaos) -> Any:
    return chaos.job("scancel")


def _requeue(chaos: Chaos) -> Any:
    return chaos.job("scontrol", "requeue")


def _warn(chaos: Chaos) -> Any:
    return chaos.job("scancel", "--batch", "--signal=USR1")


def _gate(chaos: Chaos) -> Any:
    return chaos.strike(signal.SIGKILL, "gate")


def _crash(chaos: Chaos) -> Any:
    node = chaos.node()
    if node:
        chaos.cluster.crash(node)
        chaos.later(chaos.draw.uniform(1, 20), chaos.cluster.restore, node)
    return node


def _freeze(chaos: Chaos) -> Any:
    node = chaos.node()
    if node:
        chaos.cluster.freeze(node)
        chaos.later(chaos.draw.uniform(1, 15), chaos.cluster.thaw, node)
    return node


def _controller(chaos: Chaos) -> Any:
    chaos.cluster.kill_controller()
    time.sleep(chaos.draw.uniform(0, 4))
    chaos.cluster.start_controller()
    return True


def _preempt(chaos: Chaos) -> Any:
    words = ("-p", "high", "--exclusive", "-N", "2", "-t", "1", "--output=/dev/null")
    return chaos.cluster.run("sbatch", *words, "--wrap", "sleep 2", check=False).stdout


FAULTS: dict[str, tuple[float, Fault]] = {
    "kill": (6, _kill),
    "term": (3, _terminate),
    "pause": (4, _pause),
    "scancel": (2, _element),
    "requeue": (2, _requeue),
    "limit": (3, _warn),
    "gate": (1, _gate),
    "crash": (1, _crash),
    "freeze": (1, _freeze),
    "controller": (0.5, _controller),
    "preempt": (1, _preempt),
}
"""Each fault, how often it is drawn beside the others, and what does it."""


@dataclass
class Chaos:
    """Faults against one run."""

    cluster: Testbed
    run: Run
    draw: random.Random
    met: Counter[tuple[str, str]] = field(default_factory=Counter)
    resubmitted: Counter[str] = field(default_factory=Counter)
    released: int = 0
    due: list[tuple[float, Callable[..., Any], tuple[Any, ...]]] = field(default_factory=list)

    def later(self, seconds: float, undo: Callable[..., Any], *words: Any) -> None:
        """Takes a fault back after a while."""
        self.due.append((time.monotonic() + seconds, undo, words))

    def undo(self, everything: bool = False) -> None:
        """Takes back what is due."""
        now = time.monotonic()
        for item in list(self.due):
            if everything or item[0] <= now:
                self.due.remove(item)
                try:
                    item[1](*item[2])
                except psutil.NoSuchProcess:
                    continue

    def strike(self, number: int, verb: str = "work") -> psutil.Process | None:
        """Sends a signal to one of the run's payloads."""
        found = [p for stage in self.run.chain().stages for p in self.run.payloads(stage, verb)]
        for process in self.draw.sample(found, len(found)):
            try:
                process.send_signal(number)
                return process
            except psutil.NoSuchProcess:
                continue
        return None

    def running(self) -> list[list[str]]:
        """Id, node and name of the run's jobs at work."""
        said = self.cluster.run("squeue", "-h", "-t", "R", "-o", "%i|%N|%j", check=False).stdout
        jobs = (line.split("|") for line in said.splitlines())
        return [job for job in jobs if job[2].startswith(prefix(self.run.dir) + "-")]

    def job(self, *command: str) -> str:
        """Does something to one of the run's working jobs, or elements."""
        jobs = [job for job in self.running() if ".gate-" not in job[2]]
        if not jobs:
            return ""
        chosen = self.draw.choice(jobs)[0]
        self.cluster.run(*command, chosen, check=False)
        return chosen

    def node(self) -> str:
        """A node at work, unless another one is down: the chain has to get somewhere."""
        busy = sorted({job[1] for job in self.running()})
        return self.draw.choice(busy) if busy and not self.due else ""

    def stage(self) -> str:
        """The stage that is at work now."""
        standing = gates.standing(self.run.chain())
        return next((name for name, done in standing.items() if not done), "")

    def progress(self) -> float:
        """The share of all shards that is complete."""
        config = self.run.chain().stages["numbers"].config
        made = [len(sidecars(self.run.dir.shards(stage))) for stage in self.run.chain().stages]
        return sum(made) / (4 * -(-config["n"] // config["per_shard"]))

    def fault(self) -> bool:
        """One fault; whether there was anything that it could meet."""
        stage = self.stage()
        weights = [weight for weight, _ in FAULTS.values()]
        name = self.draw.choices(list(FAULTS), weights)[0]
        if not FAULTS[name][1](self):
            return False
        self.met[name, stage] += 1
        return True

    def go(self, faults: int) -> None:
        """Strikes until the chain has met so many faults, then lets it end."""
        give_up = time.monotonic() + PATIENCE * max(1, faults / 20)
        while sum(self.met.values()) < faults and self.stage():
            assert time.monotonic() < give_up, self.run.say()
            self.undo()
            self.again()
            # As many by now as the chain has come far, so that they meet every stage.
            if sum(self.met.values()) < faults * (0.1 + 1.1 * self.progress()):
                self.fault()
            time.sleep(self.draw.uniform(0.2, 1.5))
        self.undo(everything=True)
        while self.stage():
            wait_for(lambda: not self.stage() or not self.run.queue(), say=self.run.say)
            assert time.monotonic() < give_up, self.run.say()
            self.again()

    def again(self) -> None:
        """What a person does: releases what is held, submits again once the queue is empty."""
        stopped, queued = self.run.dir.marked(STOPPED) is not None, self.run.queue()
        if held := [job for job, _, reason, _ in queued if "held" in reason]:
            self.release(held)
        elif self.stage() and (stopped or not queued):
            wait_for(lambda: not self.run.queue(), say=self.run.say)
            self.resubmitted[self.stage()] += 1
            self.run.submit(check=False)

    def release(self, held: list[str]) -> None:
        """Takes nodes that Slurm has drained (a job's id twice, say) back, then their jobs."""
        self.released += 1
        said = self.cluster.run("sinfo", "-h", "-N", "-t", "drain", "-o", "%N", check=False).stdout
        for node in set(said.split()):
            self.cluster.mend(node)
        self.cluster.run("scontrol", "release", *held, check=False)

    def count(self) -> dict[str, dict[str, int]]:
        """Records expected, lost and doubled, by stage."""
        keys = {f"n:{i}" for i in range(self.run.chain().stages["numbers"].config["n"])}
        told = {}
        for stage in self.run.chain().stages:
            folder = self.run.dir.shards(stage)
            found = Counter(
                key
                for index in sidecars(folder)
                for key, _ in read_groups(shard_path(folder, index))
            )
            if found or stage != "total":
                told[stage] = {
                    "expected": len(keys),
                    "lost": len(keys - found.keys()),
                    "doubled": sum(count - 1 for count in found.values()),
                    "strange": len(found.keys() - keys),
                }
        return told


def chaos(cluster: Testbed, seed: int, faults: int) -> Chaos:
    """Runs a chain through so many faults; checks nothing.

    Args:
        cluster: A test cluster that is up.
        seed: Draws the faults.
        faults: How many.
    """
    asked = profile(partition="low", lease_ttl=6.0, linger=3.0)
    asked.cpu.workers = 4
    asked.gate.retries = 6
    run = Run(cluster, asked)
    # Long enough that every fault finds work; short shards, so that many are handed over.
    count = max(24, 3 * faults)
    run.submit(f"n={count}", "per_shard=6", "pause=1.0", "steps=5")
    made = Chaos(cluster, run, random.Random(seed))
    made.go(faults)
    return made


def table(met: Counter[tuple[str, str]]) -> str:
    """Fault × stage, as text."""
    stages = sorted({stage for _, stage in met})
    names = sorted({name for name, _ in met})
    rows = [["", *stages], *([n, *(str(met[n, s] or "·") for s in stages)] for n in names)]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in rows)
    return "\n".join(line.rstrip() for line in lines)


def report(made: Chaos, seed: int) -> tuple[str, bool]:
    """What happened, and whether every record is there exactly once."""
    lines, good = [f"seed {seed}: {sum(made.met.values())} faults", table(made.met)], True
    times = made.resubmitted.total()
    lines.append(
        f"by hand: submitted again {times} times, held jobs released {made.released} times"
    )
    for stage, counts in made.count().items():
        lines.append(f"{stage}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
        good &= not (counts["lost"] or counts["doubled"] or counts["strange"])
    return "\n".join(lines), good


def save(made: Chaos, seed: int, seconds: float, load: tuple[float, ...], good: bool) -> None:
    """Keeps what happened, as JSON and as a table."""
    found = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    code = describe(("hpc",))["code"]["hpc"]
    found[str(seed)] = {
        "commit": code.get("commit", code["sources"])[:12],
        "changed": bool(code.get("changed")),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "load": [round(value, 1) for value in (load[0], os.getloadavg()[0])],
        "seconds": round(seconds),
        "faults": sum(made.met.values()),
        "met": [[fault, stage, count] for (fault, stage), count in sorted(made.met.items())],
        "submitted again": made.resubmitted.total(),
        "released": made.released,
        "records": made.count(),
        "good": good,
    }
    found = {key: found[key] for key in sorted(found, key=int)}
    SAVED.write_text(json.dumps(found, indent=1) + "\n")
    SAVED.with_suffix(".md").write_text(page(found))


def page(found: dict[str, Any]) -> str:
    """The saved seeds for a reader."""
    met: Counter[tuple[str, str]] = Counter()
    for one in found.values():
        met.update({(fault, stage): count for fault, stage, count in one["met"]})
    lines = [
        "# Faults throughout a chain",
        "",
        "`python -m tests.cluster.chaos --seeds … --faults 100 --save` on the test cluster: four",
        "nodes of a real Slurm on one machine. Records are those of all map stages together.",
        "",
        "| seed | faults | submitted again by hand | held jobs released by hand "
        "| records expected | lost | doubled | minutes | load | commit |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for seed, one in found.items():
        sums = {
            what: sum(counts[what] for counts in one["records"].values())
            for what in ("expected", "lost", "doubled")
        }
        mark = " (changed)" if one["changed"] else ""
        told = [seed, one["faults"], one["submitted again"], one["released"], *sums.values()]
        told += [f"{one['seconds'] / 60:.0f}", "–".join(map(str, one["load"]))]
        lines.append("| " + " | ".join(map(str, told)) + f" | {one['commit']}{mark} |")
    lines += ["", "Which fault met which stage, all seeds together:", "", "```", table(met), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The faults of one seed, on a cluster that is started where none runs."""
    words = argparse.ArgumentParser(prog="chaos", description=__doc__)
    words.add_argument("--seeds", type=int, nargs="+", default=[0])
    words.add_argument("--faults", type=int, default=100)
    words.add_argument("--save", action="store_true", help=f"keep the results in {SAVED.name}")
    asked = words.parse_args()
    cluster = Testbed(say=lambda text: print(text, file=sys.stderr))
    cluster.up(cluster.settings if cluster.running() else Settings())
    whole = True
    for seed in asked.seeds:
        begun, load = time.monotonic(), os.getloadavg()
        cluster.reset()
        try:
            made = chaos(cluster, seed, asked.faults)
            text, good = report(made, seed)
        finally:
            cluster.reset()
        print(text, flush=True)
        if asked.save:
            save(made, seed, time.monotonic() - begun, load, good)
        whole &= good
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
