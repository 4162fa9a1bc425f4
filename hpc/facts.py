"""What Slurm tells of a cluster, and of this user there; each thing is asked once."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from hpc import slurm
from hpc.errors import UserError
from hpc.slurm import Queued, SlurmError

_UNITS = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
_USELESS = ("down", "drain", "fail", "maint", "unk", "inval", "power", "not_resp")
_ASSOCIATION = (
    "account",
    "partition",
    "qos",
    "defaultqos",
    "maxjobs",
    "maxsubmitjobs",
    "grpsubmitjobs",
    "maxwall",
)
_RULE = ("name", "maxjobspu", "maxsubmitjobspu", "maxsubmitjobspa", "grpsubmitjobs", "maxwall")


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


class Facts:
    """A cluster's answers, each asked for when it is first needed, and kept.

    A submission needs some of them in several places, and a controller has others to serve.

    Args:
        patience: Seconds to wait for a controller that is away.

    Raises:
        UserError: On any first look: Slurm is not here, or does not answer.
    """

    def __init__(self, patience: float = 60.0) -> None:
        self.patience = patience

    def look(self) -> None:
        """Asks for everything that admission needs, side by side once the controller answers."""
        if not self.config:
            return
        asked = ("_nodes", "_partitions", "queue", "associations", "rules")
        with ThreadPoolExecutor(len(asked)) as pool:
            list(pool.map(lambda name: getattr(self, name), asked))

    @cached_property
    def config(self) -> dict[str, str]:
        """What ``scontrol show config`` tells."""
        return slurm.config(self.patience)

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """The partitions that this user sees, with their nodes."""
        return read_partitions(self._nodes, self._partitions)

    @cached_property
    def _nodes(self) -> str:
        form = "%R|%N|%T|%c|%m|%G|%f"
        return slurm.patiently("sinfo", "-h", "-N", "-o", form, patience=self.patience)

    @cached_property
    def _partitions(self) -> str:
        return slurm.patiently("scontrol", "-o", "show", "partition", patience=self.patience)

    @property
    def nodes(self) -> set[str]:
        """The names of all nodes."""
        return {node.name for one in self.partitions.values() for node in one.nodes}

    @cached_property
    def queue(self) -> list[Queued]:
        """This user's jobs that wait or run, as they were at the first look."""
        return slurm.queue("", patience=self.patience)

    @cached_property
    def associations(self) -> list[dict[str, str]] | None:
        """This user's accounts with their limits; None where no accounts are kept."""
        return _table(_ASSOCIATION, "assoc", f"user={getpass.getuser()}")

    @cached_property
    def rules(self) -> list[dict[str, str]] | None:
        """Every quality of service with its limits; None where no accounts are kept."""
        return _table(_RULE, "qos")


def _table(fields: tuple[str, ...], *words: str) -> list[dict[str, str]] | None:
    """A table of the accounts' database, a line each; None where there is no such database."""
    command = ("sacctmgr", "--noheader", "--parsable2", "show", *words)
    try:
        said = slurm.call(*command, f"format={','.join(fields)}")
    except (SlurmError, UserError):
        return None
    lines = (line.split("|") for line in said.splitlines() if line.strip("|"))
    return [dict(zip(fields, line, strict=False)) for line in lines]


def read_partitions(said_nodes: str, said_partitions: str) -> dict[str, Partition]:
    """The partitions that sinfo and scontrol told, with their nodes."""
    nodes: dict[str, list[Node]] = {}
    for line in said_nodes.splitlines():
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
    for line in said_partitions.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name = fields.get("PartitionName", "")
        found[name] = Partition(fields, tuple(nodes.get(name, ())))
    return found


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
