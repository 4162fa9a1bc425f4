"""A job, and what the driver asks of whatever runs its jobs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpc.container import Container


@dataclass(frozen=True)
class Job:
    """Some processes of one stage, all with the same command.

    Attributes:
        stage: The stage's name.
        command: The argument vector; no shell is involved.
        logs: The folder that gets one log a process.
        attempt: Counts the stage's tries, from 0; part of the logs' names.
        count: How many processes (the pulling workers of a map stage).
        threads: Cores each process may use.
        resources: The kind of resources a cluster profile knows.
        env: Set on top of the driver's environment.
        name: What a batch system lists it under; unique in it.
        role: ``work``, or on a batch system ``gate`` or ``preflight``.
        array: Whether a batch system runs the processes as elements of an array; otherwise
            they are ``nodes`` × ``tasks`` ranks of one job.
        nodes: Nodes of such a job.
        tasks: Tasks a node.
        after: What a batch system waits for, as ``afterok:17``.
        avoid: Nodes on which an earlier attempt failed.
        also: Of a preflight: its command once more in each other image that stages run in.
    """

    stage: str
    command: tuple[str, ...]
    logs: Path
    attempt: int = 0
    count: int = 1
    threads: int = 1
    resources: str = "cpu"
    env: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    role: str = "work"
    array: bool = False
    nodes: int = 1
    tasks: int = 1
    after: str = ""
    avoid: tuple[str, ...] = ()
    also: tuple[tuple[Container, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class State:
    """How far a job is.

    Attributes:
        running: Processes that are waiting or at work.
        ended: Exit status and log of those that ended; a negative status is a signal.
        processes: Ids of all its processes, as far as they are known.
    """

    running: int
    ended: tuple[tuple[int, Path], ...] = ()
    processes: tuple[int, ...] = ()


class Executor(Protocol):
    """Runs the driver's jobs as processes; on a cluster nobody drives, gates go on by themselves.

    Attributes:
        keep: Descriptors that local processes inherit: the lock of the run, which is thereby
            held until the last of them has left.
    """

    keep: tuple[int, ...]

    def submit(self, job: Job) -> str:
        """Starts a job and returns its handle."""
        ...

    def state(self, handle: str) -> State:
        """How far a job is; never waits."""
        ...

    def cancel(self, handle: str, kill: bool = False) -> None:
        """Asks a job's processes to save and leave; with ``kill`` ends them at once."""
        ...

    def close(self) -> None:
        """Ends whatever still runs and releases what the executor holds."""
        ...
