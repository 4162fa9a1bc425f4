"""A cluster's own configuration, as Slurm tells it, against a profile."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hpc import slurm
from hpc.cluster import Profile, Resources
from hpc.errors import UserError
from hpc.slurm import SlurmError

_UNITS = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
_SINGLE = ("training", "gate")  # jobs that are no arrays
_USELESS = ("down", "drain", "fail", "maint", "unk", "inval", "power", "not_resp")


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        level: ``ok``, ``note`` (worth knowing) or ``wrong`` (to be mended first).
        about: What it speaks of.
        said: What was found and, where it is wrong, what to do.
    """

    level: str
    about: str
    said: str

    def __str__(self) -> str:
        return f"{self.level:5}  {self.about}: {self.said}"


@dataclass(frozen=True)
class Node:
    """What a node has, as Slurm sees it; memory in MiB."""

    name: str
    state: str
    cores: int
    memory: int
    gpus: int
    features: frozenset[str]

    @property
    def usable(self) -> bool:
        """Whether jobs may start on it, now or soon."""
        return not any(word in self.state.lower() for word in _USELESS)


@dataclass(frozen=True)
class Partition:
    """What Slurm tells of a partition, its fields as ``scontrol show partition`` names them."""

    fields: Mapping[str, str]
    nodes: tuple[Node, ...]

    @property
    def minutes(self) -> float:
        """The longest time limit of a job; infinite where there is none."""
        return duration(self.fields.get("MaxTime", "UNLIMITED"))


@dataclass(frozen=True)
class Kind:
    """One way to ask for resources, and the kinds of stage (or stages) that do."""

    names: tuple[str, ...]
    partition: str
    account: str
    qos: str
    constraint: str
    resources: Resources

    @property
    def title(self) -> str:
        """The kinds' names, for people."""
        return "/".join(self.names)


def kinds(profile: Profile) -> list[Kind]:
    """The different ways in which a profile's stages ask for nodes."""
    found: dict[tuple[str, str, str, str, int], list[str]] = {}
    asked = profile.named()
    words = ("partition", "account", "qos", "constraint")
    for name, resources in asked.items():
        where = (profile.word(resources, word) for word in words)
        partition, account, qos, constraint = where
        key = (partition, account, qos, constraint, resources.gpus)
        found.setdefault(key, []).append(name)
    return [
        Kind(tuple(names), partition, account, qos, constraint, asked[names[0]])
        for (partition, account, qos, constraint, _), names in found.items()
    ]


def check(profile: Profile) -> list[Finding]:
    """Everything that can be told without a job.

    Raises:
        UserError: There is no Slurm here, or it does not answer.
    """
    config = slurm.config()
    return [*_of_cluster(config), *hold(profile, profile.named(), read_partitions(), config)]


def hold(
    profile: Profile,
    asked: Mapping[str, Resources],
    partitions: Mapping[str, Partition],
    config: Mapping[str, str],
) -> list[Finding]:
    """Kinds of job, by name, against partitions, accounts and quality of service."""
    findings: list[Finding] = []
    for name, resources in asked.items():
        findings += _of_kind(name, resources, profile, partitions, config)
    return findings + _of_accounts(profile, asked)


def _of_cluster(config: Mapping[str, str]) -> Iterator[Finding]:
    version = config.get("SLURM_VERSION", "of unknown version")
    yield Finding("ok", "cluster", f"{config.get('ClusterName', '?')}, Slurm {version}")
    if config.get("JobRequeue") == "0":
        yield Finding("note", "JobRequeue", "0; every job of a chain asks for --requeue itself")
    if re.match(r"(\d+)", wait := config.get("KillWait", "")) and int(wait.split()[0]) < 20:
        yield Finding("note", "KillWait", f"{wait}; a job has no longer to save after SIGTERM")
    if "CANCEL" in config.get("PreemptMode", ""):
        yield Finding("note", "PreemptMode", "CANCEL; gates submit again what preemption ends")


def _of_kind(
    name: str,
    resources: Resources,
    profile: Profile,
    partitions: Mapping[str, Partition],
    config: Mapping[str, str],
) -> Iterator[Finding]:
    limit = int(config.get("MaxArraySize", "1001").split()[0] or 0)
    if name not in _SINGLE and resources.workers > max(limit, 1):
        yield Finding(
            "wrong",
            f"{name}.workers",
            f"{resources.workers}, MaxArraySize is {limit}; ask for less",
        )
    asked = profile.word(resources, "partition")
    names = asked.split(",") if asked else [_default(partitions)]
    for partition in names:
        if partition not in partitions:
            there = ", ".join(sorted(partitions)) or "none that you may use"
            yield Finding(
                "wrong", f"{name}.partition", f"{partition or 'no default'}: there is {there}"
            )
            continue
        problems = [*_misfits(name, resources, profile, partitions[partition])]
        yield from problems
        if not any(problem.level == "wrong" for problem in problems):
            yield _fits(name, resources, partition, partitions[partition], profile)


def _misfits(
    name: str, resources: Resources, profile: Profile, partition: Partition
) -> Iterator[Finding]:
    fields = partition.fields
    about = f"{name} in {fields.get('PartitionName')}"
    if (state := fields.get("State", "UP")) != "UP":
        if state == "DOWN":
            yield Finding("note", about, "the partition is DOWN; jobs wait until it is up")
        else:
            yield Finding("wrong", about, f"the partition is {state}; choose another")
    if resources.minutes > partition.minutes:
        yield Finding(
            "wrong",
            f"{name}.minutes",
            f"{resources.minutes}, the partition allows {partition.minutes:.0f}; ask for less, "
            "jobs go on in the next one",
        )
    for word, allow in (("account", "AllowAccounts"), ("qos", "AllowQos")):
        wanted = profile.word(resources, word)
        allowed = fields.get(allow, "ALL")
        if wanted and allowed != "ALL" and wanted not in allowed.split(","):
            yield Finding("wrong", f"{name}.{word}", f"{wanted}; the partition takes {allowed}")
    fitting = [node for node in partition.nodes if _has(node, resources, profile)]
    if len(fitting) < resources.nodes:
        largest = max(partition.nodes, key=lambda node: (node.gpus, node.cores), default=None)
        shown = f"the largest has {_having(largest)}" if largest else "it has no node"
        yield Finding(
            "wrong",
            about,
            f"{len(fitting)} nodes with {_wanting(resources)}, {resources.nodes} needed; {shown}",
        )
    if "CANCEL" in fields.get("PreemptMode", ""):
        yield Finding("note", about, "preemption cancels jobs; gates submit again what is missing")


def _fits(
    name: str, resources: Resources, title: str, partition: Partition, profile: Profile
) -> Finding:
    fitting = [node for node in partition.nodes if _has(node, resources, profile)]
    usable = sum(node.usable for node in fitting)
    shown = f"{len(fitting)} nodes with {_wanting(resources)}, limit {_minutes(partition.minutes)}"
    if usable < resources.nodes:
        return Finding("note", f"{name} in {title}", f"{shown}; only {usable} of them are up")
    return Finding("ok", f"{name} in {title}", shown)


def _has(node: Node, resources: Resources, profile: Profile) -> bool:
    constraint = profile.word(resources, "constraint")
    wanted = set(constraint.split("&")) if re.fullmatch(r"[\w.&-]+", constraint) else set()
    return (
        node.cores >= resources.cores * resources.tasks
        and node.gpus >= resources.gpus
        and node.memory >= megabytes(resources.memory)
        and wanted <= node.features
    )


def _wanting(resources: Resources) -> str:
    parts = [f"{resources.cores * resources.tasks} cores"]
    parts += [f"{resources.gpus} GPUs"] if resources.gpus else []
    parts += [resources.memory] if resources.memory else []
    return ", ".join(parts)


def _having(node: Node) -> str:
    return f"{node.cores} cores, {node.gpus} GPUs, {node.memory} MiB"


def _of_accounts(profile: Profile, asked: Mapping[str, Resources]) -> list[Finding]:
    """Associations and quality-of-service limits of this user."""
    user = getpass.getuser()
    form = "account,partition,qos,defaultqos,maxjobs,maxsubmitjobs,maxwall"
    try:
        lines = table("sacctmgr", "show", "assoc", f"user={user}", f"format={form}")
        rules = table("sacctmgr", "show", "qos", "format=name,maxjobspu,maxsubmitjobspu,maxwall")
    except (SlurmError, UserError):
        said = "none kept (no slurmdbd); hours are counted from what the jobs themselves record"
        return [Finding("note", "accounting", said)]
    if not lines:
        return [Finding("note", "accounting", f"no association of {user}; no limit is known")]
    limits = {line[0]: line[1:] for line in rules}
    findings = [
        Finding("ok", "accounting", f"{user} in {', '.join(sorted({x[0] for x in lines}))}")
    ]
    for name, resources in asked.items():
        findings += _of_association(name, resources, profile, lines, limits)
    return findings


def _of_association(
    name: str,
    resources: Resources,
    profile: Profile,
    lines: list[list[str]],
    rules: Mapping[str, list[str]],
) -> Iterator[Finding]:
    account = profile.word(resources, "account")
    mine = [line for line in lines if not account or line[0] == account]
    if not mine:
        there = ", ".join(sorted({line[0] for line in lines}))
        yield Finding("wrong", f"{name}.account", f"{account} is none of yours; choose of {there}")
        return
    allowed = {word for line in mine for word in line[2].split(",") if word}
    qos = profile.word(resources, "qos") or mine[0][3]
    qos = qos or (mine[0][2] if len(allowed) == 1 else "")
    if qos and allowed and qos not in allowed:
        shown = ", ".join(sorted(allowed))
        yield Finding("wrong", f"{name}.qos", f"{qos} is not allowed; choose of {shown}")
        return
    most = {"account": mine[0][4:7]}
    if qos in rules:
        most[f"QOS {qos}"] = rules[qos][:3]
    workers = 1 if name in _SINGLE else resources.workers
    for whose, (running, queued, wall) in most.items():
        if queued.isdigit() and int(queued) < workers + 2:
            said = f"{workers} workers and their gates; {whose} allows {queued} jobs"
            yield Finding("wrong", f"{name}.workers", f"{said} in the queue; ask for fewer")
        elif running.isdigit() and int(running) < workers:
            said = f"{running} of {workers} will run at once ({whose})"
            yield Finding("note", f"{name}.workers", said)
        if wall and resources.minutes > duration(wall):
            said = f"{resources.minutes}; {whose} allows {_minutes(duration(wall))}; ask for less"
            yield Finding("wrong", f"{name}.minutes", said)


# ---- reading


def read_partitions(patience: float = 60.0) -> dict[str, Partition]:
    """The partitions that this user sees, with their nodes.

    Args:
        patience: Seconds to wait for the controller.

    Raises:
        UserError: Slurm does not answer.
    """
    nodes: dict[str, list[Node]] = {}
    said = slurm.patiently("sinfo", "-h", "-N", "-o", "%R|%N|%T|%c|%m|%G|%f", patience=patience)
    for line in said.splitlines():
        partition, name, state, cores, memory, gres, features = line.split("|", 6)
        node = Node(
            name,
            state,
            _number(cores),
            _number(memory),
            _gpus(gres),
            frozenset(features.split(",")),
        )
        nodes.setdefault(partition, []).append(node)
    found = {}
    said = slurm.patiently("scontrol", "-o", "show", "partition", patience=patience)
    for line in said.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name = fields.get("PartitionName", "")
        found[name] = Partition(fields, tuple(nodes.get(name, ())))
    return found


def _default(partitions: Mapping[str, Partition]) -> str:
    named = (name for name, one in partitions.items() if one.fields.get("Default") == "YES")
    return next(named, "")


def table(command: str, *words: str) -> list[list[str]]:
    """The lines of one of Slurm's parsable tables, split into their fields.

    Raises:
        SlurmError: The command failed.
        UserError: It is not here.
    """
    said = slurm.call(command, "--noheader", "--parsable2", *words)
    return [line.split("|") for line in said.splitlines() if line.strip("|")]


def _gpus(gres: str) -> int:
    """GPUs of ``gpu:a100:4(S:0-1),shard:8``."""
    counts: Iterable[str] = re.findall(r"(?:^|,)gpu(?::[^,:(]+)?:(\d+)", gres)
    return sum(map(int, counts))


def _number(text: str) -> int:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


def megabytes(text: str) -> float:
    """MiB of ``16G``; 0 for nothing."""
    found = re.fullmatch(r"(\d+)([KMGT]?)", text)
    return int(found[1]) * _UNITS[found[2]] if found else 0


def duration(text: str) -> float:
    """Minutes of ``[days-]hours:minutes:seconds`` and its short forms; infinite for no limit.

    Raises:
        UserError: It is no time at all.
    """
    if text in ("UNLIMITED", "INFINITE", "NONE", ""):
        return float("inf")
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, *([days] if dash else []))) or len(parts) > 3:
        raise UserError(f"Slurm speaks of a time {text!r}, which nobody understands")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 1:
        hours, minutes, seconds = 0, numbers[0], 0
    else:
        hours, minutes, seconds = [0, *numbers][-3:]
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60


def _minutes(value: float) -> str:
    return "none" if value == float("inf") else f"{value:.0f} min"
