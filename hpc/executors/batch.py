"""The text of a batch job: directives, and a short host bash around one payload command.

Control stays outside, the payload inside: it says by its exit status what it wants (0 done, 75
queue me again, 76 this gate wants a retry, 77 stop the chain), and bash alone talks to Slurm.
The bash stands in ``hpc/executors/host``; every script carries what it needs of it, so that a
job depends on nothing but its payload.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import submitit

from hpc import container, slurm
from hpc.cluster import Profile, Resources
from hpc.errors import UserError
from hpc.executors.base import Job
from hpc.naming import prefix
from hpc.rundir import RunDir

_HOST = Path(__file__).parent / "host"
_RANK = (
    "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID "
    "LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE NODE_RANK=$SLURM_NODEID; "
)
# A step's own bash knows of the image what the script's does.
_INSIDE = "inside=$(declare -p run role ${!image*}; declare -f $(compgen -A function))"


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
    if profile.container.image:
        container.check_bindable(run.path)
    executor = SbatchText(run.path / "slurm")
    executor.parameters.update(_directives(run, job, profile, resources, by_hand))
    executor.parameters["setup"] = [*_setup(run, job, profile, resources, retry, by_hand)]
    executor.parameters["teardown"] = [_bash("work" if job.role == "work" else "decide")]
    line = _command(job, bool(profile.container.image), run if by_hand else None)
    made: str = executor._make_submission_file_text(line, "")
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

    log = str(log_path(run, job)).replace("%a", "*")
    known = {
        "stage": job.stage,
        "attempt": str(job.attempt),
        "role": job.role,
        "requeues": str(profile.requeues),
        "patience": str(round(profile.submit.patience)),
        "nodes": str(job.nodes),
        "cores": str(job.nodes * job.tasks * resources.cores),
        "gpus": str(job.nodes * resources.gpus),
        "minutes": str(resources.minutes),
        "payload": "",
    }
    before = [f"export {name}={shlex.quote(value)}" for name, value in _variables(job, profile)]
    if profile.environment:
        before.append(f". {shlex.quote(profile.environment)}")
    before += profile.setup
    if by_hand:
        within = log.removeprefix(str(run.path)).replace(job.name, "$name")
        lines = [
            *before,
            "# Submitted from the run directory, under a name with the run's id; see chain.sh",
            "run=$SLURM_SUBMIT_DIR",
            'prefix=iv-$(cat "$run/slurm/id")',
            f"name={named(job.name)}",
            f'log="$run{within}"',
        ]
    else:
        # After the site's own lines, which may use the same names.
        lines = [*before, f"run={shlex.quote(str(run.path))}", f"prefix={prefix(run)}"]
        lines += [f"name={job.name}", f"log={shlex.quote(log)}"]
    lines += [f"{name}={shlex.quote(value)}" for name, value in known.items()]
    if job.nodes * job.tasks > 1:
        lines += [
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        ]
    lines.append(_bash("common"))
    if profile.container.image:
        lines.append(container.script(profile.container, resources.gpus, profile.scratch))
        if job.nodes * job.tasks > 1:
            lines.append(_INSIDE)
    if job.role == "work":
        return lines
    lines.append(f"exported=({' '.join(profile.export)}) notify={shlex.quote(profile.notify)}")
    asked = shlex.join(slurm.ACCOUNTS) if profile.budget.gpu_hours else ""
    lines.append(f"accounts=({asked})")
    if retry is not None:
        lines += [
            f"next_work={named(retry.work)} next_gate={named(retry.gate)}",
            "dependents=("
            + " ".join(f'"{name} {" ".join(p)}"' for name, p in retry.dependents.items())
            + ")",
        ]
    return [*lines, _bash("gate")]


def _variables(job: Job, profile: Profile) -> list[tuple[str, str]]:
    """What the payload finds in its environment beside what the profile lets pass."""
    fixed = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONNOUSERSITE": "1",
        "HF_HUB_OFFLINE": "1",
        "HPC_LEASE_TTL": f"{profile.lease_ttl:g}",
        "HPC_STALL": f"{profile.stall:g}",
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads)),
    }
    if profile.scratch:
        fixed["TMPDIR"] = profile.scratch
    return [*(fixed | dict(job.env)).items()]


def _command(job: Job, inside: bool, unnamed: RunDir | None = None) -> str:
    """The line that runs the payload, ``inside`` an image where there is one.

    The directory of an ``unnamed`` run is ``$run``.
    """
    hidden = str(unnamed.path) if unnamed else None
    words = " ".join('"$run"' if word == hidden else shlex.quote(word) for word in job.command)
    if job.nodes * job.tasks > 1:
        # Without ALL a step gets no more than the variables on the job's own list.
        step = "run srun --export=ALL --kill-on-bad-exit=1 bash -c"
        if inside:
            rank = shlex.quote(f'\n{_RANK}contained "$@"')
            return f'{step} "$inside"{rank} rank {words}'
        rank = shlex.quote(f'{_RANK}exec "$@"')
        return f"{step} {rank} rank {words}"
    contained = "contained " if inside else ""
    return f"{'run' if job.role == 'work' else 'persist'} {contained}{words}"


@cache
def _bash(name: str) -> str:
    return (_HOST / f"{name}.sh").read_text(encoding="utf-8").strip("\n")
