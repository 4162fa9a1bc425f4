"""The jobs of a chain on a cluster: what each one runs, asks for and waits for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hpc import gates
from hpc.cluster import Profile, Resources
from hpc.container import Container
from hpc.executors.base import Job
from hpc.executors.batch import Retry, suffix, text
from hpc.executors.slurm import SlurmExecutor
from hpc.naming import gate_name, next_attempt, work_name
from hpc.rundir import Chain, RunDir

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
        first = next(iter(stage.inputs.values()))
        source = chain.run.read_manifest(first)
        left = source["shards"] if source and gates.fresh(chain, first) else None
    workers = min(asked.workers, left or asked.workers)  # a run's own number is for one machine
    return Job(
        stage=name,
        command=_command(chain, profile, profile.container_of(asked), "work", name),
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
        command=_command(chain, profile, profile.container, "gate", name, str(attempt), str(first)),
        logs=chain.run.path / "slurm" / "logs",
        attempt=attempt,
        name=gate_name(chain.run, name, attempt),
        role="gate",
    )


def preflight_job(chain: Chain, profile: Profile, stages: Sequence[str], attempt: int) -> Job:
    """The first job: can a node work here at all?"""
    inside = [profile.container_of(profile.of_stage(stage)) for stage in chain.stages.values()]
    others = {one.image: one for one in inside if one.image != profile.container.image}
    return Job(
        stage=PREFLIGHT,
        command=_command(chain, profile, profile.container, "preflight", *stages),
        logs=chain.run.path / "slurm" / "logs",
        attempt=attempt,
        name=work_name(chain.run, PREFLIGHT, attempt),
        role="preflight",
        also=tuple((one, _command(chain, profile, one, "preflight")) for one in others.values()),
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


def _command(chain: Chain, profile: Profile, container: Container, *words: str) -> tuple[str, ...]:
    """The payload's command: ``PROGRAM work RUN STAGE`` and its like."""
    command, *rest = words
    program = profile.program or chain.command
    if container.image:
        program = container.inside(chain.command)
    return (*program, command, str(chain.run.path), *rest)


@dataclass(frozen=True)
class Planned:
    """A job of a plan.

    Attributes:
        name: The job's name.
        file: What its script is called.
        after: The names of the jobs it waits for.
        condition: ``afterok``, ``afterany`` or empty.
        job: What runs.
        resources: What it asks for.
        text: Its exact sbatch text. Its dependency, which needs ids, is given at submission.
    """

    name: str
    file: str
    after: tuple[str, ...]
    condition: str
    job: Job
    resources: Resources
    text: str


def plan_of(chain: Chain, profile: Profile, by_hand: bool = False) -> list[Planned]:
    """Every job that a submission of a chain would queue now, in order.

    Args:
        chain: The chain.
        profile: The cluster.
        by_hand: Texts for a person to submit, in whatever run directory.
    """
    standing = gates.standing(chain)
    todo = [name for name in chain.stages if not standing[name]]
    first = [name for name in todo if not set(chain.stages[name].parents) & set(todo)]
    if not todo:
        return []
    attempt = next_attempt(chain.run, PREFLIGHT)
    preflight = Step(preflight_job(chain, profile, first, attempt), profile.gate)
    planned = [_planned(chain, profile, preflight, PREFLIGHT, by_hand)]
    gate_of: dict[str, str] = {}
    for name in todo:
        attempt = next_attempt(chain.run, name)
        work, gate = steps_of(chain, profile, name, attempt, attempt)
        gate_of[name] = gate.job.name
        before = tuple(gate_of[parent] for parent in chain.stages[name].parents if parent in todo)
        work = replace(work, after=before or (preflight.job.name,), condition="afterok")
        planned.append(_planned(chain, profile, work, name, by_hand))
        planned.append(_planned(chain, profile, gate, f"{name}.gate", by_hand))
    return planned


def _planned(chain: Chain, profile: Profile, step: Step, file: str, by_hand: bool) -> Planned:
    asked = step.resources
    return Planned(
        name=step.job.name,
        file=file,
        after=step.after,
        condition=step.condition,
        job=step.job,
        resources=asked,
        text=text(chain.run, step.job, profile, asked, step.retry, by_hand),
    )


_CHAIN = r"""#!/bin/bash
# Submits the whole chain by hand: chain.sh [RUN], RUN being the run directory. Call it from where
# the files named below are found.
{about}
set -euo pipefail
run=${{1:-{default}}}
scripts=$(cd "$(dirname "$0")" && pwd)
{prepare}
cd "$run"
mkdir -p slurm/logs
cp -r "$scripts"/host-* slurm  # what the scripts read
prefix=iv-$(cat slurm/id)
if grep -qs "\"name\": \"$prefix{first}\"" jobs.jsonl; then
  echo "$run: submitted before; \`insightv submit\` adds what is missing" >&2
  exit 2
fi

declare -A id  # of each job, by its script
send() {{  # SCRIPT STAGE ATTEMPT ROLE CONDITION [SCRIPT…]: submits a job behind others, records it
  local script=$1 stage=$2 attempt=$3 role=$4 after=$5 name parent
  name=$prefix-$script-a$attempt
  shift 5
  for parent; do after+=:${{id[$parent]}}; done
  id[$script]=$(sbatch --parsable --job-name="$name" ${{after:+"--dependency=$after"}} \
    "$scripts/$script.sh")
  id[$script]=${{id[$script]%%;*}}
  printf '{{"time": %s, "event": "submitted", "name": "%s", "job": "%s", ' \
    "$(date +%s)" "$name" "${{id[$script]}}" >>jobs.jsonl
  printf '"stage": "%s", "attempt": %d, "role": "%s"}}\n' "$stage" "$attempt" "$role" >>jobs.jsonl
  echo "${{id[$script]}}  $name"
}}

{sends}
"""


def chain_script(
    run: RunDir, planned: Sequence[Planned], default: str, prepare: str, about: str
) -> str:
    """A script that submits the scripts of a plan, from whatever folder they lie in.

    Args:
        run: The run directory that the plan was made for.
        planned: The jobs, their texts made for submission by hand.
        default: The run directory where none is given.
        prepare: A line of bash that makes the run directory ``$run`` ready for its jobs.
        about: How the scripts were written.
    """
    file_of = {item.name: item.file for item in planned}
    sends = []
    for item in planned:
        words = [item.file, item.job.stage, str(item.job.attempt), item.job.role]
        words += [item.condition or "''", *(file_of[name] for name in item.after)]
        sends.append(f"send {' '.join(words)}")
    return _CHAIN.format(
        about=f"# {about}",
        default=shlex.quote(default),
        prepare=prepare,
        first=suffix(run, planned[0].name),
        sends="\n".join(sends),
    )
