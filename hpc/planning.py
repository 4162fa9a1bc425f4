"""The jobs of a chain on a cluster: what each one runs, asks for and waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpc import gates
from hpc.cluster import Profile, Resources
from hpc.executors.base import Job
from hpc.executors.batch import Retry, text
from hpc.executors.slurm import SlurmExecutor
from hpc.naming import gate_name, prefix, work_name
from hpc.rundir import Chain

PREFLIGHT = "preflight"


@dataclass(frozen=True)
class Step:
    """A job of the chain, before it has an id.

    Attributes:
        job: What is submitted; its ``after`` is filled in when the ids are known.
        resources: What it asks for.
        after: The names of the jobs it waits for.
        condition: ``afterok`` or ``afterany``; empty where it waits for none.
        retry: Of a gate.
    """

    job: Job
    resources: Resources
    after: tuple[str, ...] = ()
    condition: str = ""
    retry: Retry | None = None


def work_job(
    chain: Chain,
    profile: Profile,
    name: str,
    attempt: int,
    avoid: Sequence[str] = (),
    left: int | None = None,
) -> Job:
    """The job that does a stage's work.

    Args:
        chain: The chain.
        profile: The cluster.
        name: The stage.
        attempt: Its number.
        avoid: Nodes to keep away from.
        left: Shards to make, where that is known.
    """
    stage, asked = chain.stages[name], profile.of_stage(chain.stages[name])
    if left is None and stage.kind == "map":
        source = chain.run.read_manifest(next(iter(stage.inputs.values())))
        first = next(iter(stage.inputs.values()))
        left = source["shards"] if source and gates.fresh(chain, first) else None
    workers = min(asked.workers, stage.workers, left or asked.workers)
    return Job(
        stage=name,
        command=_command(chain, profile, "work", name),
        logs=chain.run.logs(name),
        attempt=attempt,
        count=max(workers, 1) if stage.kind == "map" else 1,
        threads=asked.cores,
        resources=stage.resources,
        name=work_name(chain.run, name, attempt),
        array=stage.kind == "map",
        nodes=asked.nodes if stage.distributed else 1,
        tasks=asked.tasks if stage.distributed else 1,
        avoid=tuple(avoid),
    )


def gate_job(chain: Chain, profile: Profile, name: str, attempt: int, first: int) -> Job:
    """The job that ends an attempt of a stage."""
    return Job(
        stage=name,
        command=_command(chain, profile, "gate", name, str(attempt), str(first)),
        logs=chain.run.path / "slurm" / "logs",
        attempt=attempt,
        name=gate_name(chain.run, name, attempt),
        role="gate",
    )


def preflight_job(chain: Chain, profile: Profile, stages: Sequence[str], attempt: int) -> Job:
    """The first job: can a node work here at all?"""
    return Job(
        stage=PREFLIGHT,
        command=_command(chain, profile, "preflight", *stages),
        logs=chain.run.path / "slurm" / "logs",
        attempt=attempt,
        name=work_name(chain.run, PREFLIGHT, attempt),
        role="preflight",
    )


def retry_of(chain: Chain, name: str, attempt: int) -> Retry:
    """How the gate after an attempt submits the next."""
    pending = {other for other in chain.stages if not gates.fresh(chain, other)} | {name}
    dependents = {
        other: tuple(parent for parent in stage.parents if parent in pending)
        for other, stage in chain.stages.items()
        if name in stage.parents
    }
    return Retry(
        work=work_name(chain.run, name, attempt + 1),
        gate=gate_name(chain.run, name, attempt + 1),
        prefix=prefix(chain.run),
        dependents=dependents,
    )


def steps_of(
    chain: Chain,
    profile: Profile,
    name: str,
    attempt: int,
    first: int,
    avoid: Sequence[str] = (),
    left: int | None = None,
) -> tuple[Step, Step]:
    """The work of a stage's attempt and the gate behind it."""
    stage = chain.stages[name]
    work = work_job(chain, profile, name, attempt, avoid, left)
    gate = gate_job(chain, profile, name, attempt, first)
    retry = retry_of(chain, name, attempt)
    return (
        Step(work, profile.of_stage(stage)),
        Step(gate, profile.gate, (work.name,), "afterany", retry),
    )


def scripts(
    chain: Chain,
    profile: Profile,
    name: str,
    attempt: int,
    first: int,
    avoid: Sequence[str] = (),
    left: int | None = None,
) -> None:
    """Writes the scripts of a stage's attempt, for a gate's bash to submit."""
    executor = SlurmExecutor(chain.run, profile)
    for step in steps_of(chain, profile, name, attempt, first, avoid, left):
        executor.write(step.job, step.resources, step.retry)


def step_text(chain: Chain, profile: Profile, step: Step) -> str:
    """A step's exact sbatch text."""
    return text(chain.run, step.job, profile, step.resources, step.retry)


def _command(chain: Chain, profile: Profile, *words: str) -> tuple[str, ...]:
    """The payload's command: ``PROGRAM work RUN STAGE`` and its like."""
    command, *rest = words
    program = profile.program or chain.command
    return (*program, command, str(chain.run.path), *rest)
