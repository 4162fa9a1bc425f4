"""Slurm's commands and what they print; nothing here knows of chains.

JSON shapes differ between Slurm's versions and ``scontrol --json`` is young, so everything is
asked for in the oldest plain format.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.errors import UserError

_AWAY = re.compile(
    r"[Cc]ontact|timed out|[Rr]efused|[Tt]emporar|Zero Bytes|try again|[Uu]nexpected message"
)
_UNKNOWN = re.compile(r"configuration source|[Uu]nable to process configuration file")
"""What Slurm's commands say where nobody told them of a cluster."""
_QUEUE = "%F|%K|%j|%T|%N|%M|%r"
_ACCOUNTS = ("JobID", "JobName", "State", "Start", "ElapsedRaw", "AllocTRES")
ACCOUNTS = (
    "--noheader",
    "--parsable2",
    "--allocations",
    "--duplicates",
    f"--format={','.join(_ACCOUNTS)}",
)
"""What sacct is asked for."""
_FIRST_PAUSE = 15.0  # longer than a controller keeps a request whose sender gave up
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}


class SlurmError(Exception):
    """A command of Slurm failed.

    Attributes:
        away: Whether the controller could not be reached; trying again may help.
    """

    def __init__(self, command: str, said: str, away: bool) -> None:
        super().__init__(f"{command}: {said}")
        self.said, self.away = said, away


class Refused(UserError):
    """Slurm does not take a job.

    Attributes:
        orphaned: Because it does not know a job that this one is to wait for.
    """

    def __init__(self, name: str, said: str) -> None:
        super().__init__(f"{name}: Slurm refuses it ({said})")
        self.orphaned = "ependency" in said


@dataclass(frozen=True)
class Queued:
    """A line of squeue: a job, or elements of an array that wait alike.

    Attributes:
        job: The id; an array's own for its elements.
        element: The element's index; a range (``3-7``) of pending ones; empty for a job.
        name: The job's name.
        state: PENDING, RUNNING, …
        node: Where it runs.
        seconds: How long it has been running.
        reason: Why it waits.
    """

    job: str
    element: str
    name: str
    state: str
    node: str
    seconds: int
    reason: str

    @property
    def count(self) -> int:
        """How many elements the line speaks of."""
        total = 0
        for part in self.element.partition("%")[0].split(","):
            first, _, last = part.partition("-")
            if first.isdigit():
                total += (int(last) - int(first) + 1) if last.isdigit() else 1
        return max(total, 1)


def available() -> bool:
    """Whether Slurm's commands are here."""
    return shutil.which("sbatch") is not None


def answers() -> bool:
    """Whether there is a cluster that can be asked, now."""
    try:
        return available() and bool(call("scontrol", "show", "config", seconds=20.0))
    except (SlurmError, UserError):
        return False


def environment(exported: Sequence[str]) -> dict[str, str]:
    """What Slurm's commands see: no variable of a surrounding job, no secret."""
    names = (*exported, "PATH", "SLURM_CONF")
    return {name: os.environ[name] for name in names if name in os.environ}


def call(*words: str, env: Mapping[str, str] | None = None, seconds: float = 60.0) -> str:
    """Runs one of Slurm's commands.

    Raises:
        SlurmError: It failed, or took too long.
        UserError: There is no such command, or it knows of no cluster.
    """
    named = (os.environ if env is None else env).get("SLURM_CONF")
    if named and not Path(named).exists():  # Slurm itself would look for a minute
        raise UserError(f"SLURM_CONF names {named}, which is not there; mend it, or unset it")
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=seconds, env=env
        )
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not here; run this on a machine that submits to Slurm"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(words[0], f"no answer in {seconds:.0f} s", True) from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
    away = bool(_AWAY.search(said))
    if not away and _UNKNOWN.search(said):
        raise UserError(
            f"Slurm is not configured here: {words[0]} finds no slurm.conf and no controller; "
            "run this on a machine that submits to the cluster, or set SLURM_CONF"
        )
    raise SlurmError(words[0], said, away)


def tell_waiting(seconds: float) -> None:
    """Says that the controller is being waited for."""
    if seconds > 0:
        print(
            f"Slurm does not answer; waiting up to {seconds:.0f} s (submit.patience)",
            file=sys.stderr,
            flush=True,
        )


def patiently(*words: str, patience: float = 600.0) -> str:
    """Runs a command again and again while the controller is away.

    Raises:
        UserError: It fails otherwise, or the controller stays away.
    """
    give_up, told = time.monotonic() + patience, False
    while True:
        try:
            return call(*words)
        except SlurmError as error:
            if not error.away or time.monotonic() > give_up:
                raise UserError(f"{error}; try again when Slurm answers") from None
        if not told:
            tell_waiting(patience)
            told = True
        time.sleep(2.0)


def queue(prefix: str, everything: bool = False, patience: float = 600.0) -> list[Queued]:
    """This user's jobs whose names begin with ``prefix``, in one call of squeue.

    Args:
        prefix: Of the names.
        everything: Ended jobs too, as long as the controller remembers them.
        patience: Seconds to wait for the controller.
    """
    states = ["--states=all"] if everything else []
    said = patiently(
        "squeue", "--me", "--noheader", *states, f"--format={_QUEUE}", patience=patience
    )
    found = [_queued(line) for line in said.splitlines()]
    return [job for job in found if job.name.startswith(prefix)]


def _queued(line: str) -> Queued:
    job, element, name, state, node, running, reason = line.split("|", 6)
    element = "" if element == "N/A" else element
    return Queued(job, element, name, state, node, _seconds(running), reason)


def _seconds(text: str) -> int:
    """Seconds of ``[D-]HH:MM:SS`` or ``MM:SS``; 0 where there is none."""
    days, _, clock = text.rpartition("-")
    if not re.fullmatch(r"\d+(:\d+)*", clock) or (days and not days.isdigit()):
        return 0
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return total + 86400 * int(days or 0)


@dataclass(frozen=True)
class Spent:
    """What one attempt of a job, or of an array's element, has used.

    Attributes:
        job: The id, as ``17`` or ``17_3``.
        name: The job's name.
        state: How it ended, or stands; empty where nobody knows.
        start: When it began; sorts the starts of one job.
        seconds: Wall-clock.
        nodes: How many nodes.
        cores: How many cores.
        gpus: How many GPUs.
    """

    job: str
    name: str
    state: str
    start: str
    seconds: float
    nodes: int
    cores: int
    gpus: int


def accounts(jobs: Sequence[str]) -> list[Spent] | None:
    """What jobs have used, attempts before a requeue included, in one call of sacct.

    Returns:
        None where the cluster keeps no accounts.
    """
    if not jobs:
        return []
    try:
        return read_accounts(call("sacct", *ACCOUNTS, f"--jobs={','.join(jobs)}"))
    except (SlurmError, UserError):
        return None


def read_accounts(said: str) -> list[Spent]:
    """What sacct printed for `ACCOUNTS`."""
    found = []
    for line in said.splitlines():
        values = line.split("|")
        if len(values) == len(_ACCOUNTS):
            found.append(_spent(dict(zip(_ACCOUNTS, values, strict=True))))
    return found


def _spent(line: Mapping[str, str]) -> Spent:
    allocated = dict(item.split("=", 1) for item in line["AllocTRES"].split(",") if "=" in item)

    def number(name: str) -> int:
        return int(allocated.get(name, 0)) if str(allocated.get(name, 0)).isdigit() else 0

    seconds = int(line["ElapsedRaw"] or 0)
    state = line["State"].partition(" ")[0]
    return Spent(
        line["JobID"],
        line["JobName"],
        state,
        line["Start"],
        seconds,
        number("node"),
        number("cpu"),
        number("gres/gpu"),
    )


def config(patience: float = 600.0) -> dict[str, str]:
    """What ``scontrol show config`` tells, each value without its comment in brackets."""
    found = {}
    for line in patiently("scontrol", "show", "config", patience=patience).splitlines():
        key, equals, value = line.partition("=")
        if equals:
            found[key.strip()] = value.strip()
    return found


def submit(script: Path, name: str, exported: Sequence[str], patience: float = 600.0) -> str:
    """Submits a script, once, whatever happens to sbatch.

    Whenever sbatch's answer is lost, the job may have come into being all the same; so its
    name is looked for before it is submitted again.

    Args:
        script: The batch script; its job's name is ``name``.
        name: Unique to this job among all of this user's.
        exported: Variables that sbatch sees.
        patience: Seconds to go on while the controller is away.

    Returns:
        The job's id.

    Raises:
        Refused: Slurm does not take the job.
        UserError: Slurm stays away.
    """
    give_up, pause, doubtful = time.monotonic() + patience, _FIRST_PAUSE, False
    while True:
        try:
            if doubtful and (job := _by_name(name)):
                return job
            said = call("sbatch", "--parsable", str(script), env=environment(exported))
            job = said.split()[-1].partition(";")[0]
            if doubtful:
                _cancel_doubles(name, job)
            return job
        except SlurmError as error:
            if not error.away:
                raise Refused(name, error.said) from None
            if time.monotonic() > give_up:
                raise UserError(f"{name}: {error}; submit again when Slurm answers") from None
        if not doubtful:
            tell_waiting(patience)
        doubtful = True
        time.sleep(pause)


def _by_name(name: str) -> str:
    """The id of a job of this name, if there is one; the first where there are more."""
    found = _ids(name, "--states=all")
    _cancel(found[1:])
    return str(found[0]) if found else ""


def _cancel_doubles(name: str, job: str) -> None:
    _cancel([found for found in _ids(name) if found != int(job)])


def _ids(name: str, *options: str) -> list[int]:
    """The ids of this user's jobs of a name, in order."""
    said = call("squeue", "--me", "--noheader", *options, f"--name={name}", "--format=%F")
    return sorted({int(word) for word in said.split() if word.isdigit()})


def _cancel(jobs: Sequence[int]) -> None:
    if jobs:
        call("scancel", *map(str, jobs))


def cancel(jobs: Sequence[str], kill: bool = False, patience: float = 600.0) -> None:
    """Cancels jobs; those that ended meanwhile are no error."""
    for begin in range(0, len(jobs), 100):
        signal = ["--signal=KILL", "--full"] if kill else []
        patiently("scancel", *signal, *jobs[begin : begin + 100], patience=patience)


def test_only(script: Path, exported: Sequence[str]) -> str:
    """What Slurm thinks of a script, submitting nothing: empty, or why it refuses.

    Raises:
        SlurmError: Slurm cannot be asked.
    """
    try:
        call("sbatch", "--test-only", str(script), env=environment(exported))
    except SlurmError as error:
        if error.away:
            raise
        return error.said
    return ""
