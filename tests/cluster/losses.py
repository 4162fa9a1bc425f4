"""Work lost to kills: how much of what a worker had finished must be made again.

``python -m tests.cluster.losses --seed 1 --kills 8`` kills workers of a chain at random moments,
with SIGKILL and by ``scontrol requeue``, and prints for each kill the records that were finished,
not yet kept, and made again, and the seconds of the worker they stand for; status 1 if those were
more than a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from chains import Run, profile  # noqa: E402
from testbed import Settings, Testbed  # noqa: E402

MINUTE = 60.0
STAGE = "double"
_BETWEEN = (15, 45)  # seconds between two kills


@dataclass(frozen=True)
class Loss:
    """What a kill cost.

    Attributes:
        how: ``kill`` or ``requeue``.
        worked: Seconds since the worker's first call in this life.
        records: Finished before the kill, and made again.
        seconds: From the first of those to the kill.
    """

    how: str
    worked: float
    records: int
    seconds: float

    def __str__(self) -> str:
        told = f"{self.records:3} records, {self.seconds:5.1f} s of one worker"
        return f"{self.how:8} after {self.worked:5.0f} s: {told}"


def losses(cluster: Testbed, seed: int, kills: int) -> list[Loss]:
    """Kills workers of a chain at random moments; a worker finishes a record a second."""
    draw = random.Random(seed)
    asked = profile()
    asked.cpu.workers, asked.gate.retries = 4, kills
    run = Run(cluster, asked)
    # Work for twice as long as the kills are likely to take.
    count = 2 * 4 * kills * sum(_BETWEEN) // 2
    size = (f"n={count}", "per_shard=100", "pause=2.0", f"only={STAGE}")
    run.submit("small=true", "calls=true", *size)
    struck: list[tuple[str, str, float]] = []
    while len(struck) < kills:
        time.sleep(draw.uniform(*_BETWEEN))
        # A worker begins again in its place: what counts is what it has done since.
        told = {job for _, begun, _, job in calls(run) if begun > _last(struck, job, time.time())}
        found = {job: process for process in run.payloads(STAGE) if (job := _job(process)) in told}
        if not found:
            assert run.queue(), run.say()
            continue
        job = draw.choice(sorted(found))
        how = draw.choices(("kill", "requeue"), (3, 1))[0]
        struck.append((how, job, time.time()))
        if how == "kill":
            found[job].kill()
        else:
            cluster.run("scontrol", "requeue", job)
    run.wait(3000)
    run.check()
    return [_loss(run, _last(struck, job, when), how, job, when) for how, job, when in struck]


def calls(run: Run) -> list[tuple[str, float, float, str]]:
    """Each finished call: key, begin, end and job."""
    path = run.dir.stage_dir(STAGE) / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _job(process: psutil.Process) -> str:
    try:
        return process.environ().get("SLURM_JOB_ID", "")
    except psutil.Error:
        return ""


def _last(struck: list[tuple[str, str, float]], job: str, now: float) -> float:
    """When a job was struck before now; 0 if it was not."""
    return max((when for _, other, when in struck if other == job and when < now), default=0.0)


def _loss(run: Run, since: float, how: str, job: str, when: float) -> Loss:
    made = calls(run)
    before = [call for call in made if call[3] == job and call[1] > since and call[2] <= when]
    again = {call[0] for call in made if call[1] > when}
    lost = [call for call in before if call[0] in again]
    first = min((call[2] for call in lost), default=when)
    return Loss(how, when - min(call[1] for call in before), len(lost), when - first)


def main() -> int:
    """The kills of one seed, on a cluster that is started where none runs."""
    words = argparse.ArgumentParser(prog="losses", description=__doc__)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--kills", type=int, default=8)
    asked = words.parse_args()
    cluster = Testbed(say=lambda text: print(text, file=sys.stderr))
    cluster.up(cluster.settings if cluster.running() else Settings())
    found = losses(cluster, asked.seed, asked.kills)
    print(*found, sep="\n")
    return 0 if max(loss.seconds for loss in found) <= MINUTE else 1


if __name__ == "__main__":
    sys.exit(main())
