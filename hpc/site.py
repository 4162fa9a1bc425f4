"""A cluster's own configuration, as Slurm tells it, against a profile."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hpc.cluster import Profile, Resources
from hpc.facts import Facts, Node, Partition, duration, megabytes

_SINGLE = ("training", "gate")  # jobs that are no arrays


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
    found: dict[tuple[str, str, str, str, int, str], list[str]] = {}
    asked = profile.named()
    words = ("partition", "account", "qos", "constraint")
    for name, resources in asked.items():
        where = (profile.word(resources, word) for word in words)
        partition, account, qos, constraint = where
        inside = profile.container_of(resources).image
        key = (partition, account, qos, constraint, resources.gpus, inside)
        found.setdefault(key, []).append(name)
    return [
        Kind(tuple(names), partition, account, qos, constraint, asked[names[0]])
        for (partition, account, qos, constraint, *_), names in found.items()
    ]


def check(profile: Profile, facts: Facts | None = None) -> list[Finding]:
    """Everything that can be told without a job.

    Args:
        profile: The cluster.
        facts: Keeps what the cluster is asked.

    Raises:
        UserError: There is no Slurm here, or it does not answer.
    """
    facts = facts or Facts()
    return [*_of_cluster(facts.config), *hold(profile, profile.named(), facts)]


def hold(profile: Profile, asked: Mapping[str, Resources], facts: Facts) -> list[Finding]:
    """Kinds of job, by name, against partitions, accounts and quality of service."""
    findings: list[Finding] = []
    for name, resources in asked.items():
        findings += _of_kind(name, resources, profile, facts.partitions, facts.config)
    return findings + _of_accounts(profile, asked, facts)


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


def _of_accounts(profile: Profile, asked: Mapping[str, Resources], facts: Facts) -> list[Finding]:
    """Associations and quality-of-service limits of this user."""
    lines, rules = facts.associations, facts.rules
    if lines is None or rules is None:
        said = "none kept (no slurmdbd); hours are counted from what the jobs themselves record"
        return [Finding("note", "accounting", said)]
    user = getpass.getuser()
    if not lines:
        return [Finding("note", "accounting", f"no association of {user}; no limit is known")]
    limits = {
        line["name"]: (line["maxjobspu"], line["maxsubmitjobspu"], line["maxwall"])
        for line in rules
    }
    accounts = ", ".join(sorted({line["account"] for line in lines}))
    findings = [Finding("ok", "accounting", f"{user} in {accounts}")]
    for name, resources in asked.items():
        findings += _of_association(name, resources, profile, lines, limits)
    return findings


def _of_association(
    name: str,
    resources: Resources,
    profile: Profile,
    lines: Sequence[Mapping[str, str]],
    rules: Mapping[str, tuple[str, str, str]],
) -> Iterator[Finding]:
    account = profile.word(resources, "account")
    mine = [line for line in lines if not account or line["account"] == account]
    if not mine:
        there = ", ".join(sorted({line["account"] for line in lines}))
        yield Finding("wrong", f"{name}.account", f"{account} is none of yours; choose of {there}")
        return
    allowed = {word for line in mine for word in line["qos"].split(",") if word}
    qos = profile.word(resources, "qos") or mine[0]["defaultqos"]
    qos = qos or (mine[0]["qos"] if len(allowed) == 1 else "")
    if qos and allowed and qos not in allowed:
        shown = ", ".join(sorted(allowed))
        yield Finding("wrong", f"{name}.qos", f"{qos} is not allowed; choose of {shown}")
        return
    most = {"account": (mine[0]["maxjobs"], mine[0]["maxsubmitjobs"], mine[0]["maxwall"])}
    if qos in rules:
        most[f"QOS {qos}"] = rules[qos]
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


def _default(partitions: Mapping[str, Partition]) -> str:
    named = (name for name, one in partitions.items() if one.fields.get("Default") == "YES")
    return next(named, "")


def _minutes(value: float) -> str:
    return "none" if value == float("inf") else f"{value:.0f} min"
