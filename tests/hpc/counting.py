"""A chain of seconds without torch: numbers → double, square → total, triple.

With ``enough``, a chain with a decision instead: numbers → double → decide; beside that, more,
which decide may end; behind both, sum, which it may let pass; at last, told.

As a program: ``counting.py run RUN [key=value …]``, ``submit RUN PROFILE [key=value …]``,
``cancel RUN``, ``status RUN``, and the payloads of `hpc.control`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc import config as configs
from hpc import gates, submission
from hpc.cluster import read_profile
from hpc.control import payload
from hpc.disk import write_atomic
from hpc.driver import drive
from hpc.errors import RecordError, UserError
from hpc.executors.local import LocalExecutor
from hpc.naming import make_id
from hpc.rundir import Chain, RunDir
from hpc.shards import join, write_groups
from hpc.stages import Context, Counts, Row, Stage
from hpc.status import status

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Counting:
    n: int = 40
    per_shard: int = 4
    factor: int = 2
    offset: int = 0
    fail_every: int = 0  # every such number fails
    fault: str = configs.unhashed("")  # stage:kind, one of user, crash, exit, requeue, hang
    ranks: bool = configs.unhashed(False)  # numbers is made by several ranks
    small: bool = configs.unhashed(False)  # only numbers, double and, after that, triple
    error_limit: float = configs.unhashed(0.0)
    pause: float = configs.unhashed(0.0)  # seconds a number takes
    only: str = configs.unhashed("")  # the one map stage in which it does; empty: each
    steps: int = configs.unhashed(0)  # seconds that numbers is counted beforehand, saved each
    enough: str = ""  # what decide says when doubles are enough; ``not`` that they are not
    calls: bool = configs.unhashed(False)  # each call is told: key, begin, end, job
    workers: int = configs.unhashed(2)
    slots: int = configs.unhashed(2)
    retries: int = configs.unhashed(3)
    preload: bool = configs.unhashed(True)


@dataclass
class Times:
    """Multiplies each number."""

    factor: int
    settings: Counting
    context: Context
    pause: float = 0.0
    concurrency: int = 2

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        begun = time.time()
        await asyncio.sleep(self.pause)
        if self.settings.calls:
            told = (key, begun, time.time(), os.environ["SLURM_JOB_ID"])
            with (self.context.directory / "calls").open("a") as file:
                file.write(json.dumps(told) + "\n")
        (row,) = inputs["numbers"]
        if self.settings.fail_every and row["value"] % self.settings.fail_every == 0:
            raise RecordError(f"{row['value'] % 2 and 'odd' or 'even'} numbers are not liked")
        return [{"key": key, "value": row["value"] * self.factor}]

    async def close(self) -> None:
        pass


def make_chain(run: Path, settings: Counting) -> Chain:
    def numbers(context: Context) -> Counts | None:
        misbehave(settings, "numbers", context)
        if settings.ranks:
            told = {name: os.environ[name] for name in RENDEZVOUS}
            (context.run / f"rank{told['RANK']}.json").write_text(json.dumps(told))
            if told["RANK"] != "0":
                return {}
        if not count(settings, context):
            return None
        groups = [(f"n:{i}", [{"key": f"n:{i}", "value": i}]) for i in range(settings.n)]
        shards = write_groups(context.directory / "shards", iter(groups), settings.per_shard)
        return {"shards": shards}

    def load(name: str, factor: int) -> object:
        def load_it(context: Context) -> Times:
            misbehave(settings, name, context)
            pause = settings.pause if settings.only in ("", name) else 0.0
            return Times(factor, settings, context, pause)

        return load_it

    def total(context: Context) -> Counts:
        misbehave(settings, "total", context)
        steps = 5
        for step in range(steps):
            context.progress(step, steps, loss=1.0 / (step + 1))
            time.sleep(settings.pause)
        folders = {"double": context.shards("double"), "square": context.shards("square")}
        summed = 0
        for _, rows in join(folders):
            summed += sum(row["value"] for role in folders for row in rows[role])
        (context.run / "models" / "total").mkdir(parents=True, exist_ok=True)
        (context.run / "models" / "total" / "sum.txt").write_text(str(summed + settings.offset))
        return {"sum": summed}

    common = {"error_limit": settings.error_limit, "workers": settings.workers}
    over = {"numbers": "numbers"}
    fails = {"fail_every": settings.fail_every}
    size = {"n": settings.n, "per_shard": settings.per_shard}
    double = {"factor": settings.factor, **fails}
    stages = [
        Stage("numbers", "job", config=size, run=numbers, distributed=settings.ranks),
        Stage(
            "double",
            "map",
            over,
            config=double,
            load=load("double", settings.factor),
            counted=("value",),
            **common,
        ),
        Stage("square", "map", over, config=fails, load=load("square", 3), **common),
        Stage(
            "total",
            "job",
            {"double": "double", "square": "square"},
            config={"offset": settings.offset},
            run=total,
            outputs=("models/total",),
        ),
        Stage("triple", "map", over, after=("total",), load=load("triple", 3), **common),
    ]
    if settings.small:
        after = Stage("triple", "map", over, after=("double",), load=load("triple", 3), **common)
        stages = [*stages[:2], after]
    if settings.enough:
        stages = [*stages[:2], *deciding(settings, load("more", 3))]
    command = [sys.executable, str(Path(__file__).resolve())]
    return Chain(stages, RunDir(run), command)


def deciding(settings: Counting, more: object) -> list[Stage]:
    def decide(context: Context) -> Counts:
        return {"skip": "" if settings.enough == "not" else settings.enough}

    def sum_up(context: Context) -> Counts:
        (context.run / "models" / "sum").mkdir(parents=True, exist_ok=True)
        found = sum(row["value"] for _, rows in read_groups_of(context) for row in rows)
        (context.run / "models" / "sum" / "sum.txt").write_text(str(found))
        return {"sum": found}

    def told(context: Context) -> Counts:
        return {"sums": len([*context.run.glob("models/sum/*")])}

    unless = ("decide",)
    return [
        Stage("decide", "job", after=("double",), config={"says": settings.enough}, run=decide),
        Stage("more", "map", {"numbers": "numbers"}, load=more, workers=2, unless=unless),
        Stage(
            "sum",
            "job",
            {"more": "more"},
            after=unless,
            run=sum_up,
            outputs=("models/sum",),
            unless=unless,
        ),
        Stage("told", "job", after=("sum",), run=told),
    ]


def read_groups_of(context: Context) -> Iterator[tuple[str, list[Row]]]:
    for _, rows in join({"more": context.shards("more")}):
        yield "", rows["more"]


def misbehave(settings: Counting, name: str, context: Context) -> None:
    stage, _, kind = settings.fault.partition(":")
    if stage != name:
        return
    if kind == "user":
        raise UserError("model /nowhere is not a model folder; give another")
    if kind == "crash":
        raise RuntimeError("out of luck")
    if kind == "exit":
        os._exit(7)
    if kind == "requeue":
        marker = context.run / "requeued"
        if not marker.exists():
            marker.touch()
            os._exit(75)
    if kind == "hang":
        marker = context.run / "hung"
        if not marker.exists():
            marker.touch()
            time.sleep(3600)


def count(settings: Counting, context: Context) -> bool:
    """A job that saves and goes on: a second a step; False when it was asked to leave."""
    saved = context.directory / "step"
    done = int(saved.read_text()) if saved.exists() else 0
    for step in range(done, settings.steps):
        if context.stopping():
            return False
        time.sleep(1.0)
        write_atomic(saved, str(step + 1))
        with (context.run / "steps").open("a") as file:
            file.write(f"{step}\n")
        context.progress(step + 1, settings.steps)
    return True


def open_chain(run: Path, overrides: Sequence[str] = ()) -> Chain:
    """The chain of a run; overrides are kept in its chain.yaml, where its workers look."""
    rundir = RunDir(run)
    source = rundir.chain_file if rundir.chain_file.exists() else None
    settings = configs.load(Counting, source, overrides)
    if overrides or source is None:
        rundir.create()
        rundir.chain_file.write_text(configs.dump(settings))
    return make_chain(run, settings)


def run(path: Path, overrides: Sequence[str] = (), **options: object) -> Chain:
    chain = open_chain(path, overrides)
    settings = configs.load(Counting, chain.run.chain_file)
    executor = LocalExecutor(preload=["hpc.work", "hpc.driver"] if settings.preload else ())
    options = {"slots": settings.slots, "retries": settings.retries, **options}
    drive(chain, executor, **options)
    return chain


def open_settings(run: Path) -> Counting:
    return configs.load(Counting, RunDir(run).chain_file)


def send(path: Path, profile: str, *overrides: str) -> int:
    """Submits to a cluster; the overrides are kept unless they are refused."""
    run = RunDir(path)
    source = run.chain_file if run.chain_file.exists() else None
    settings = configs.load(Counting, source, overrides)
    chain = make_chain(path, settings)

    def save() -> None:
        gates.refuse_changes(chain)
        write_atomic(run.chain_file, configs.dump(settings))

    print(submission.submit(chain, read_profile(Path(profile)), prepare=save))
    return 0


def main(words: Sequence[str]) -> int:
    command, path, *rest = words
    try:
        if command == "run":
            run(Path(path), rest)
            return 0
        if command == "prepare":
            make_id(open_chain(Path(path), rest).run)
            return 0
        if command == "submit":
            return send(Path(path), *rest)
        if command == "cancel":
            print(submission.cancel(RunDir(path)))
            return 0
        if command == "status":
            chain = open_chain(Path(path))
            used = submission.hours(chain.run)
            print(json.dumps(status(chain, submission.job_counts(chain.run), used)))
            return 0
        if command == "gate" and open_settings(Path(path)).fault == "gate:exit":
            return 1
        return payload(open_chain(Path(path)), [command, *rest])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
