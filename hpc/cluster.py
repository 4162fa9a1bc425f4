"""A cluster profile: where the stages of a chain run, as YAML over `Profile`.

Nothing here shapes a result. A profile that a run was submitted with stands resolved in the
run directory (``cluster.yaml``), where the gates read it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.config import load
from hpc.container import Container, Pin
from hpc.errors import UserError
from hpc.stages import Stage

if TYPE_CHECKING:
    from hpc.rundir import Chain

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:@&|*!+-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MEMORY = re.compile(r"[1-9]\d*[KMGT]")
_SECRET = re.compile(r"(?i)(api_?key|token|secret|passw|credential)")

_MOST = 10_000_000
"""No number of a profile is larger; as minutes, nineteen years."""
_EARLY = 60
"""Seconds by which Slurm may send the signal too early."""

KINDS = ("cpu", "gpu", "training", "gate")
"""What a profile says of jobs whose stage it does not name."""

EXPORTED = [
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "HF_HOME",
]


@dataclass
class Resources:
    """What one job of a kind of stage asks for; an empty word leaves the cluster's default.

    Attributes:
        partition: Where it may run; several with commas. Empty: the profile's.
        account: Who pays. Empty: the profile's.
        qos: Quality of service. Empty: the profile's.
        constraint: Node features, as ``a100&nvlink``. Empty: the profile's.
        gpus: GPUs a node; 0 asks for none.
        cores: Cores a task.
        memory: Memory a node, as ``16G``; empty: the partition's default for each core.
        minutes: Time limit. A worker or training that needs longer saves, leaves and is queued
            again; shorter limits find room sooner.
        grace: Seconds before the limit at which a job is told to save and leave. Slurm may tell
            it up to a minute early.
        workers: Most elements of a map stage's array. Workers pull shards, so a few long-lived
            ones do; far fewer than there are shards.
        parallel: Most elements that run at once; 0: all of them.
        nodes: Nodes of a distributed job.
        tasks: Tasks a node of a distributed job, mostly as many as GPUs.
        gpu_memory: GB of one GPU's memory, as in its name (80 for an A100-80GB); 0: not known,
            and no stage is held against it. Slurm is not asked for it.
        image: The SIF that its payloads run in; all else is as in the profile's ``container``.
            Empty: that of ``container``.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gpus: int = 0
    cores: int = 1
    memory: str = ""
    minutes: int = 60
    grace: int = 120
    workers: int = 4
    parallel: int = 0
    nodes: int = 1
    tasks: int = 1
    gpu_memory: float = 0.0
    image: str = ""

    def validate(self, where: str) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible.
        """
        for name in ("partition", "account", "qos", "constraint"):
            _check_word(f"{where}.{name}", getattr(self, name))
        for name in ("cores", "minutes", "workers", "nodes", "tasks"):
            _check_number(f"{where}.{name}", getattr(self, name), 1)
        for name in ("gpus", "parallel", "grace", "gpu_memory"):
            _check_number(f"{where}.{name}", getattr(self, name), 0)
        if self.memory and not _MEMORY.fullmatch(self.memory):
            raise UserError(f"{where}.memory is {self.memory!r}; give a size and its unit: 16G")
        Container(self.image).validate(where)
        if self.grace + _EARLY >= 60 * self.minutes:
            raise UserError(
                f"{where}.grace is {self.grace} s, too long for {self.minutes} min: Slurm may tell "
                "a job a minute early to leave, and no time would be left to work"
            )


@dataclass
class Override:
    """What some stages ask for otherwise than their kind: fields of `Resources`; null: alike."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int | None = None
    cores: int | None = None
    memory: str | None = None
    minutes: int | None = None
    grace: int | None = None
    workers: int | None = None
    parallel: int | None = None
    nodes: int | None = None
    tasks: int | None = None
    gpu_memory: float | None = None
    image: str | None = None

    def over(self, resources: Resources) -> Resources:
        """What ``resources`` become by it."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(resources, **given)


@dataclass
class Gate(Resources):
    """The gates and the preflight: small jobs on processors.

    Attributes:
        retries: How often in a row a stage may come out of an attempt without any progress
            before its gate stops the chain. 0: a gate submits nothing (for clusters where
            compute nodes may not); ``insightv retry`` goes on then.
    """

    minutes: int = 10
    grace: int = 0
    retries: int = 3


@dataclass
class Submission:
    """How gently the controller is treated.

    Attributes:
        per_second: Most submissions a second; some sites count them.
        patience: Seconds to go on trying while the controller is away.
    """

    per_second: float = 4.0
    patience: float = 600.0


@dataclass
class Budget:
    """What a run may cost.

    Attributes:
        gpu_hours: No gate lets the next stage, or another attempt, start once the run has used
            so many; 0: no limit.
    """

    gpu_hours: float = 0.0


@dataclass
class Profile:
    """A cluster, as far as a chain has to know it.

    Attributes:
        partition: Of every kind of stage that names none.
        account: Likewise.
        qos: Likewise.
        constraint: Likewise.
        cpu: Reductions, and map stages without GPU.
        gpu: Workers of map stages with a model.
        training: Trainings.
        gate: Gates and the preflight.
        stages: What stages ask for otherwise than their kind, by name or pattern
            (``"*-generate"``). Of several that match, the later one prevails.
        container: The image that payloads run in, where their kind or stage names no ``image``;
            none by default.
        pins: Digest and time of each such ``image``; filled in at submission.
        program: The command of the payload, where it is neither this very installation nor in an
            image.
        setup: Lines of bash before the payload (modules, ``ulimit``).
        environment: A file of ``export NAME=value`` lines that each job reads on its node: the
            place for tokens, which must be nobody else's to read. Slurm never sees it.
        export: Variables that jobs inherit from whoever submits; no others pass.
        scratch: A folder on each node for temporary files; empty: the node's own TMPDIR.
        lease_ttl: Seconds without a heartbeat after which a dead worker's shard is taken over.
        linger: Seconds after which a worker without work leaves its node to others, once every
            shard that is left is in the hands of a worker that lives. What such a worker does not
            finish, a busy one takes over, or the next attempt.
        stall: Seconds without progress after which a payload is taken for hung: a worker is
            robbed of its shards and ends itself after twice as long; a training prints every
            thread's stack and is queued again. Must exceed the loading of a model and the
            longest step.
        notify: A line of bash that each gate runs when it stops the chain, and the last one when
            the chain is complete, with the message as ``$1``: ``mail -s "$1" me@site </dev/null``
            or ``curl -d "$1" "$HOOK"``. Empty: nobody is told.
        requeues: How often a job may queue itself again at its time limit.
        kill_invalid: Let Slurm cancel jobs whose dependency can no longer come true. A few
            sites' Slurm does that too eagerly: then false, and gates do it.
        submit: How gently the controller is treated.
        budget: What a run may cost.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    cpu: Resources = field(default_factory=Resources)
    gpu: Resources = field(default_factory=lambda: Resources(gpus=1, cores=4))
    training: Resources = field(default_factory=lambda: Resources(gpus=1, cores=4))
    gate: Gate = field(default_factory=Gate)
    stages: dict[str, Override] = field(default_factory=dict)
    container: Container = field(default_factory=Container)
    pins: dict[str, Pin] = field(default_factory=dict)
    program: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    environment: str = ""
    export: list[str] = field(default_factory=lambda: list(EXPORTED))
    scratch: str = ""
    lease_ttl: float = 60.0
    linger: float = 60.0
    stall: float = 1800.0
    notify: str = ""
    requeues: int = 100
    kill_invalid: bool = True
    submit: Submission = field(default_factory=Submission)
    budget: Budget = field(default_factory=Budget)

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible.
        """
        for name in ("partition", "account", "qos", "constraint"):
            _check_word(name, getattr(self, name))
        for name in KINDS:
            getattr(self, name).validate(name)
        for name, override in self.stages.items():
            # How its minutes and grace go with those of its kind is known with a chain.
            override.over(Resources(minutes=_MOST, grace=0)).validate(f"stages.{name}")
        if self.gate.image:
            raise UserError("gate.image: gates run in the image of `container`; name it there")
        for name, number, least in (
            ("gate.retries", self.gate.retries, 0),
            ("requeues", self.requeues, 0),
            ("submit.per_second", self.submit.per_second, 0.01),
            ("submit.patience", self.submit.patience, 0),
            ("lease_ttl", self.lease_ttl, 0.1),
            ("linger", self.linger, 0),
            ("stall", self.stall, 0.1),
            ("budget.gpu_hours", self.budget.gpu_hours, 0),
        ):
            _check_number(name, number, least)
        self.container.validate()
        if self.program and (
            self.container.image or Path(self.program[0]).name in ("apptainer", "singularity")
        ):
            raise UserError(
                "program: with an image write `container: {image: …}` alone; what runs inside is "
                "container.program"
            )
        for name in self.export:
            if not _VARIABLE.fullmatch(name):
                raise UserError(f"export: {name!r} is no variable's name")
            if _SECRET.search(name):
                raise UserError(
                    f"export: {name} looks like a secret, which Slurm would store; "
                    "put it into the `environment` file"
                )

    def sections(self) -> list[Resources | Override]:
        """All that says what the jobs of stages ask for."""
        return [self.cpu, self.gpu, self.training, *self.stages.values()]

    def named(self) -> dict[str, Resources]:
        """Every kind of stage, and every entry of `stages`, with what it asks for.

        The kind of an entry's stages is known with a chain only: one that names nodes or tasks is
        taken for a training, one with ``gpus: 0`` for a reduction, any other for a worker.
        """
        found: dict[str, Resources] = {name: getattr(self, name) for name in KINDS}
        for name, entry in self.stages.items():
            single = entry.nodes is not None or entry.tasks is not None
            kind = self.training if single else self.cpu if entry.gpus == 0 else self.gpu
            found[name] = entry.over(kind)
        return found

    def word(self, resources: Resources, name: str) -> str:
        """Partition, account, qos or constraint of some jobs: their own, else the profile's."""
        found: str = getattr(resources, name) or getattr(self, name)
        return found

    def of_stage(self, stage: Stage) -> Resources:
        """What a stage's jobs ask for.

        Raises:
            UserError: What `stages` says of it does not go with its kind.
        """
        worker = self.gpu if stage.kind == "map" else self.training
        asked = kind = self.cpu if stage.resources == "cpu" else worker
        for pattern, entry in self.stages.items():
            if fnmatchcase(stage.name, pattern):
                asked = entry.over(asked)
        if asked is not kind:
            asked.validate(f"stages.{stage.name}")
        return asked

    def container_of(self, resources: Resources) -> Container:
        """What the payloads of some jobs run in: the one answer to "which image?"."""
        if not resources.image:
            return self.container
        pin = self.pins.get(resources.image, Pin())
        return replace(self.container, image=resources.image, sha256=pin.sha256, stamp=pin.stamp)

    def place(self, chain: Chain) -> None:
        """Tells a chain in which images its stages run; they are pinned."""
        chain.image = self.container.identity
        asked = {name: self.of_stage(stage) for name, stage in chain.stages.items()}
        chain.images = {
            name: told
            for name, resources in asked.items()
            if resources.image and (told := self.container_of(resources).identity)
        }


def read_profile(path: Path, overrides: Sequence[str] = ()) -> Profile:
    """Reads and checks a profile.

    Raises:
        UserError: An unknown key, an impossible value.
    """
    profile = load(Profile, path, overrides)
    try:
        profile.validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return profile


def _check_number(where: str, number: float, least: float) -> None:
    if not least <= number <= _MOST:  # nor is it `.nan`
        raise UserError(f"{where} is {number}; give {least:g} to {_MOST:,}")


def _check_word(where: str, word: str) -> None:
    if word and not _WORD.fullmatch(word):
        raise UserError(f"{where} is {word!r}, which Slurm would not take for a name")
