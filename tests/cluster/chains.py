"""The torch-free chain on the test cluster: submitted, watched, and checked at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from testbed import Site, Testbed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hpc"))
import counting  # noqa: E402

from hpc import gates  # noqa: E402
from hpc.cluster import Profile, Resources  # noqa: E402
from hpc.config import dump  # noqa: E402
from hpc.naming import prefix  # noqa: E402
from hpc.rundir import CANCELLED, STOPPED, RunDir  # noqa: E402
from hpc.shards import read_groups, shard_path, sidecars  # noqa: E402

PATIENCE = 600.0


def profile(**settings: Any) -> Profile:
    """A profile for the torch-free chain, with quick takeovers."""
    asked = {"memory": "400M", "minutes": 20, "workers": 2}
    values: dict[str, Any] = {
        "partition": "batch",
        "lease_ttl": 8.0,
    }
    made = Profile(**(values | settings))
    made.cpu = Resources(**(asked | {"grace": 30}))
    made.gate.memory = "400M"
    made.submit.per_second = 20.0
    return made


class Run:
    """A run of the chain on a cluster, driven from outside as its user would."""

    def __init__(
        self, cluster: Testbed | Site, asked: Profile | None = None, folder: Path | None = None
    ) -> None:
        self.cluster = cluster
        self.folder = folder or cluster.folder("run")
        self.path = self.folder / "run"
        self.dir = RunDir(self.path)
        self.profile = self.folder / "profile.yaml"
        self.write(asked or profile(partition=cluster.partition))

    def write(self, asked: Profile) -> None:
        self.profile.write_text(dump(asked))

    def command(self, verb: str, *words: str | Path) -> list[str | Path]:
        return [sys.executable, counting.__file__, verb, self.path, *words]

    def submit(
        self, *words: str, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return self.cluster.run(
            *self.command("submit", self.profile, *words), check=check, timeout=PATIENCE, **options
        )

    def status(self) -> dict[str, Any]:
        return json.loads(self.cluster.run(*self.command("status"), timeout=PATIENCE).stdout)

    def cancel(self) -> None:
        self.cluster.run(*self.command("cancel"), timeout=PATIENCE)

    def halted(self) -> str:
        """Waits until the chain has stopped and nothing of it is queued; says why it stopped."""
        wait_for(lambda: self.dir.marked(STOPPED) is not None and not self.queue(), say=self.say)
        return self.dir.marked(STOPPED) or ""

    def queue(self, *options: str) -> list[list[str]]:
        """Id, state, reason and name of the run's jobs."""
        said = self.cluster.run("squeue", "-r", "-h", "-o", "%i|%T|%r|%j", *options).stdout
        jobs = [line.split("|") for line in said.splitlines()]
        return [job for job in jobs if job[3].startswith(prefix(self.dir) + "-")]

    def job(self, role: str, stage: str) -> str:
        """The id of the newest job of a stage."""
        return [e["job"] for e in self.submitted() if (e["role"], e["stage"]) == (role, stage)][-1]

    def submitted(self) -> list[dict[str, Any]]:
        return [entry for entry in self.dir.read_jobs() if entry.get("event") == "submitted"]

    def ended(self, stage: str, role: str = "work") -> list[dict[str, Any]]:
        return [
            entry
            for entry in self.dir.read_jobs()
            if entry.get("event") == "ended" and (entry["stage"], entry["role"]) == (stage, role)
        ]

    def nodes(self, stage: str, role: str = "work") -> list[str]:
        """The nodes where jobs of a stage run now."""
        said = self.cluster.run("squeue", "-h", "-t", "R", "-o", "%j|%N").stdout
        begin = f"{prefix(self.dir)}-{stage}{'.gate' if role == 'gate' else ''}-a"
        lines = (line.split("|") for line in said.splitlines())
        return sorted({node for name, node in lines if name.startswith(begin)})

    def interpose(self, tool: str, pattern: str) -> tuple[dict[str, str], Path]:
        """Puts a wrapper before one of Slurm's commands that sleeps once, when it is called so.

        Returns:
            The environment to submit in, and a file that is there once the wrapper sleeps.
        """
        folder = self.folder / "bin"
        folder.mkdir()
        folder.chmod(0o777)
        wrapper, asleep = folder / tool, folder / "asleep"
        wrapper.write_text(
            f'#!/bin/bash\ncase "$*" in {pattern}) [ -e {asleep} ] || '
            f'{{ touch {asleep}; sleep 60; }} ;; esac\nexec /usr/bin/{tool} "$@"\n'
        )
        wrapper.chmod(0o755)
        return {"PATH": f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin"}, asleep

    def payloads(self, stage: str, verb: str = "work") -> list[psutil.Process]:
        """The processes at work for a stage, on any node."""
        words = [verb, str(self.path), stage]
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if line[2:5] == words:
                found.append(process)
        return found

    def working(self, stage: str, count: int = 1) -> list[psutil.Process]:
        """Waits until workers of a stage hold leases and have begun shards."""
        parts = self.dir.shards(stage)
        wait_for(
            lambda: len(self.payloads(stage)) >= count and len(list(parts.glob("*.part"))) >= count
        )
        return self.payloads(stage)

    def kill(self, stage: str) -> None:
        """Kills a stage's newest job with all its processes: nothing is left to begin again."""
        self.cluster.run("scancel", "--signal=KILL", "--full", self.job("work", stage))

    def wait(self, seconds: float = PATIENCE) -> None:
        """Until the chain is complete and nothing of it is left in the queue."""

        def over() -> bool:
            reason = self.dir.marked(STOPPED) or self.dir.marked(CANCELLED)
            assert reason is None, reason
            return all(gates.standing(self.chain()).values()) and not self.queue()

        wait_for(over, seconds, 2.0, self.say)

    def say(self) -> str:
        logs = sorted((self.path / "slurm" / "logs").glob("*.log"))
        logs += sorted(self.path.glob("stages/*/logs/*.log"))
        told = [f"{log.name}: {log.read_text()[-400:]}" for log in logs]
        jobs = self.dir.jobs.read_text() if self.dir.jobs.exists() else ""
        return "\n".join([str(self.queue()), jobs, *told])

    def chain(self) -> Any:
        return counting.open_chain(self.path)

    def check(self) -> None:
        """Every key of every stage exactly once, with the right values."""
        self.wait()
        settings = counting.open_settings(self.path)
        expected = Counter(f"n:{i}" for i in range(settings.n))
        factors = {"numbers": 1, "double": settings.factor, "square": 3, "triple": 3}
        for stage, factor in factors.items():
            if stage not in self.chain().stages:
                continue
            folder = self.dir.shards(stage)
            found: Counter[str] = Counter()
            for index in sidecars(folder):
                for key, rows in read_groups(shard_path(folder, index)):
                    found[key] += 1
                    assert [row["value"] for row in rows] == [factor * int(key[2:])], key
            assert found == expected, stage


def wait_for(
    good: Callable[[], Any],
    seconds: float = PATIENCE,
    pause: float = 0.5,
    say: Callable[[], str] = str,
) -> None:
    give_up = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < give_up, say()
        time.sleep(pause)
