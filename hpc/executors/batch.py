"""The text of a batch job: directives, variables, and the host bash around one payload command.

Control stays outside, the payload inside: it says by its exit status what it wants (0 done, 75
queue me again, 76 this gate wants a retry, 77 stop the chain, 78 this worker finds nothing left to
take), and bash alone talks to Slurm.
That bash stands in ``hpc/executors/host``. A run keeps a copy, in a folder named by its digest, and
its scripts read that: whatever becomes of the package, jobs in the queue stay what they were.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import submitit

from hpc import container, slurm
from hpc.cluster import Profile, Resources
from hpc.disk import make_folder, write_atomic
from hpc.errors import UserError
from hpc.executors.base import Job
from hpc.naming import prefix
from hpc.rundir import RunDir

_HOST = Path(__file__).parent / "host"


@dataclass(frozen=True)
class Retry:
    """What a gate needs to submit another attempt.

    Attributes:
        work: The name of the next attempt's job.
        gate: The name of the next gate.
        dependents: Each stage behind this one, with those of its parents that are not complete.
    """

    work: str
    gate: str
    dependents: Mapping[str, Sequence[str]] = field(default_factory=dict)


class SbatchText(submitit.SlurmExecutor):  # type: ignore[misc]
    """Submitit's Slurm executor, for its sbatch text and submission alone: nothing is pickled."""

    @classmethod
    def affinity(cls) -> int:
        """Texts can be made where there is no Slurm."""
        return 1

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", str(submission_file_path)]


def script_path(run: RunDir, name: str) -> Path:
    """Where a job's script lies."""
    return run.path / "slurm" / f"{name}.sh"


def log_path(run: RunDir, job: Job) -> Path:
    """Where a job writes; ``%a`` stands for the array's element."""
    if job.role == "work":
        return job.logs / f"a{job.attempt}-{'%a' if job.array else '0'}.log"
    return run.path / "slurm" / "logs" / f"{job.name}.log"


def host_name() -> str:
    """The folder, in a run's ``slurm``, of the bash that scripts written now read."""
    return f"host-{_host()[0]}"


def write_host(folder: Path) -> Path:
    """Writes the bash that scripts read, unless it is there.

    Args:
        folder: A run's ``slurm``, or where scripts are written for a person to submit.
    """
    made = make_folder(folder / host_name())
    for name, bash in _host()[1].items():
        if not (made / name).exists():
            write_atomic(made / name, bash)
    return made


def text(
    run: RunDir,
    job: Job,
    profile: Profile,
    resources: Resources,
    retry: Retry | None = None,
    by_hand: bool = False,
) -> str:
    """The exact sbatch text of a job.

    Args:
        run: The run directory.
        job: What to run.
        profile: The cluster.
        resources: What the job asks for.
        retry: For a gate: how it submits another attempt.
        by_hand: For a person to submit, in whatever run directory sbatch is called from: the
            text names neither that directory nor the run's id.

    Raises:
        UserError: The run directory's name cannot stand in a batch script.
    """
    if any(sign in str(run.path) for sign in "%\n\\\"'"):
        raise UserError(f"{run.path}: Slurm cannot log to a folder named so; choose another name")
    if profile.container_of(resources).image or job.also:
        container.check_bindable(run.path)
    executor = SbatchText(run.path / "slurm")
    executor.parameters.update(_directives(run, job, profile, resources, by_hand))
    executor.parameters["setup"] = [*_setup(run, job, profile, resources, retry, by_hand)]
    made: str = executor._make_submission_file_text(_last_lines(job), "")
    return made.replace("export SUBMITIT_EXECUTOR=slurm\n", "").rstrip() + "\n"


def suffix(run: RunDir, name: str) -> str:
    """A job's name without the run's own part, as ``-double-a0``."""
    return name.removeprefix(prefix(run))


def _directives(
    run: RunDir, job: Job, profile: Profile, resources: Resources, by_hand: bool
) -> dict[str, Any]:
    def word(name: str) -> str | None:
        return profile.word(resources, name) or None

    more: dict[str, Any] = {
        "output": str(log_path(run, job)),
        "chdir": str(run.path),
        "export": ",".join(profile.export),
        "requeue": True,
        "signal": f"B:USR1@{max(resources.grace, 1)}",
    }
    if by_hand:
        # Slurm takes both from where sbatch is called.
        del more["chdir"]
        log = str(log_path(run, job).relative_to(run.path))
        more["output"] = log.replace(job.name, "%x")
    if job.array:
        limit = f"%{resources.parallel}" if resources.parallel else ""
        more["array"] = f"0-{job.count - 1}{limit}"
    if profile.kill_invalid:
        more["kill-on-invalid-dep"] = "yes"
    if job.after:
        more["dependency"] = job.after
    if job.avoid:
        more["exclude"] = ",".join(job.avoid)
    return {
        "job_name": f"iv{suffix(run, job.name)}" if by_hand else job.name,
        "partition": word("partition"),
        "account": word("account"),
        "qos": word("qos"),
        "constraint": word("constraint"),
        "time": resources.minutes,
        "nodes": job.nodes,
        "ntasks_per_node": job.tasks,
        "cpus_per_task": resources.cores,
        "gpus_per_node": resources.gpus or None,
        "mem": resources.memory or None,
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": more,
    }


def _setup(
    run: RunDir,
    job: Job,
    profile: Profile,
    resources: Resources,
    retry: Retry | None,
    by_hand: bool,
) -> list[str]:
    """The lines before the payload."""

    def named(name: str) -> str:
        return f"$prefix{suffix(run, name)}" if by_hand else name

    variables = " ".join(f"{name}={shlex.quote(x)}" for name, x in _variables(job, profile))
    lines = [f"export {variables}"]
    if profile.environment:
        lines.append(f". {shlex.quote(profile.environment)}")
    lines += profile.setup
    # After the site's own lines, which may use the same names.
    log = str(log_path(run, job)).replace("%a", "*")
    if by_hand:
        within = log.removeprefix(str(run.path)).replace(job.name, "$name")
        lines += [
            "# Submitted from the run directory, under a name with the run's id; see chain.sh",
            "run=$SLURM_SUBMIT_DIR",
            'prefix=iv-$(cat "$run/slurm/id")',
            f"name={named(job.name)}",
            f'log="$run{within}"',
        ]
    else:
        lines += [f"run={shlex.quote(str(run.path))}", f"prefix={prefix(run)}"]
        lines += [f"name={job.name}", f"log={shlex.quote(log)}"]
    inside = profile.container_of(resources)
    if job.also:
        lines.append("image=  # several, one after the other: see below")
    elif inside.image:
        lines += container.settings(inside, resources.gpus, profile.scratch)
    else:
        lines.append("image=  # none: the payload runs as it is")
    ranks = job.nodes * job.tasks
    lines += [
        f"stage={shlex.quote(job.stage)} attempt={job.attempt} role={job.role}",
        f"ranks={ranks} nodes={job.nodes} cores={ranks * resources.cores} "
        f"gpus={job.nodes * resources.gpus} minutes={resources.minutes}",
        f"requeues={profile.requeues} patience={round(profile.submit.patience)}",
    ]
    if job.role != "work":
        lines.append(f"exported=({' '.join(profile.export)})")
        asked = shlex.join(slurm.ACCOUNTS) if profile.budget.gpu_hours else ""
        lines.append(f"notify={shlex.quote(profile.notify)} accounts=({asked})")
    if retry is not None:
        lines += [
            "# If shards are missing: what this gate submits, and who waits for that.",
            f"next_work={named(retry.work)}",
            f"next_gate={named(retry.gate)}",
            "dependents=("
            + " ".join(f'"{name} {" ".join(p)}"' for name, p in retry.dependents.items())
            + ")",
        ]
    payload = _quoted(run, job.command)
    if job.also:
        lines.append("each() {")
        for one, command in ((inside, job.command), *job.also):
            known = container.settings(one, resources.gpus, profile.scratch) if one.image else []
            lines += [f"  {line}" for line in known]
            lines.append(f"  {'contained ' * bool(known)}{_quoted(run, command)} || return")
        lines.append("}")
        payload = "each"
    return [*lines, f"payload=({payload})"]


def _quoted(run: RunDir, command: Sequence[str]) -> str:
    return " ".join('"$run"' if word == str(run.path) else shlex.quote(word) for word in command)


def _variables(job: Job, profile: Profile) -> list[tuple[str, str]]:
    """What the payload finds in its environment beside what the profile lets pass."""
    fixed = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONNOUSERSITE": "1",
        "HF_HUB_OFFLINE": "1",
        "HPC_LEASE_TTL": f"{profile.lease_ttl:g}",
        "HPC_LINGER": f"{profile.linger:g}",
        "HPC_STALL": f"{profile.stall:g}",
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads)),
    }
    if profile.scratch:
        fixed["TMPDIR"] = profile.scratch
    return [*(fixed | dict(job.env)).items()]


def _last_lines(job: Job) -> str:
    """The lines that read the host bash; it ends the job, so that what follows is another try."""
    file = "work.sh" if job.role == "work" else "gate.sh"
    return (
        "# This runs the payload, does what its exit status asks, and exits. It is read again "
        "only\n# where a node cannot see it yet.\n"
        f'for pause in 0 5 20 60; do sleep $pause; . "$run/slurm/{host_name()}/{file}"; done'
    )


@cache
def _host() -> tuple[str, dict[str, str]]:
    """The digest of the host bash, and its files."""
    made = {
        f"{name}.sh": (_HOST / f"{name}.sh").read_text(encoding="utf-8")
        for name in ("common", "contained", "work", "gate")
    }
    return hashlib.sha256("\0".join(made.values()).encode()).hexdigest()[:12], made
