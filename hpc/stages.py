"""What a chain is made of: stages, and the context their payload runs in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from hpc.cluster import Resources

Row = dict[str, Any]
Counts = dict[str, Any]


class Mapper(Protocol):
    """The payload of a map stage, loaded once a worker.

    The worker keeps up to ``concurrency`` calls in flight, so that an engine behind
    the mapper can batch them.
    """

    concurrency: int

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        """Turns one input into its output rows.

        Args:
            key: The input's key (a question's, say), unique in the stage.
            inputs: The rows of that key in each input stage, by role.

        Returns:
            The rows to store under the same key; may be empty.

        Raises:
            RecordError: This input failed; the reason is recorded, the stage goes on.
        """
        ...

    async def close(self) -> None:
        """Releases the engine; called once, also after a failure."""
        ...


class Context(Protocol):
    """What a payload may know of the run it works in."""

    @property
    def run(self) -> Path:
        """The run directory."""
        ...

    @property
    def directory(self) -> Path:
        """This stage's own directory, ``run/stages/<stage>``."""
        ...

    def shards(self, role: str) -> Path:
        """The shard folder of the input stage bound to ``role``."""
        ...

    def progress(self, done: int, total: int, **numbers: float) -> None:
        """Tells how far the payload is; ``numbers`` (loss, rate) are shown beside the bar."""
        ...

    def stopping(self) -> bool:
        """Whether a signal asked the payload to save what it has and leave."""
        ...


@dataclass(frozen=True)
class Package:
    """A Python package that a payload imports and that an installation may lack.

    Attributes:
        name: On the package index, in lower case and with dashes.
        module: What is imported of it.
        install: How to come by it, for people.
    """

    name: str
    module: str
    install: str


@dataclass(frozen=True)
class Stage:
    """One node of a chain.

    Attributes:
        name: Unique in the chain; also its folder's name. Letters, digits and dashes.
        kind: ``map`` turns shards into aligned shards with many pulling workers;
            ``job`` runs once (a reduction, a training).
        inputs: Role to name of the stage whose shards it reads. For ``map``, all inputs are
            aligned (shard i of each holds the same keys) and the first one is walked.
        after: Further stages that must be complete before (a model that is loaded, say).
        config: Everything that shapes the result; its hash is the stage's identity.
        load: For ``map``: makes the mapper. Called only when there is work.
        run: For ``job``: does the work and returns counts for the manifest. The sum of those
            named ``dropped: <reason>`` is told when the stage is complete.
        outputs: Paths relative to the run directory that completion demands
            (``models/reasoning``), beside the stage's own shards.
        workers: On one machine, how many processes pull at once (map), or how many slots the
            one process of a job takes, as threads; a cluster's profile has numbers of its own.
            Never shapes the result.
        resources: The kind of resources a cluster profile knows: ``cpu`` or ``gpu``.
        gpus: Most GPUs that one of its processes computes on; None: as many as it gets. Never
            shapes the result: a plan tells where a profile gives more.
        distributed: For ``job``: run by every rank of the nodes × tasks that a cluster profile
            gives it, at once; the counts of rank 0 are kept, and a rank that returns none was
            asked to leave, or heard that another was. Otherwise by one process.
        error_limit: Largest share of inputs that may fail before the stage does.
        unless: Job stages that decide whether this one is needed: one whose counts hold
            ``skip``, a reason, lets it pass without work, shards and outputs. A decision that is
            no parent is not waited for; it may come while the stage is at work, and ends that.
        counted: Whole numbers to be summed up beside rows, by name: fields of a map stage's rows,
            counts of a job (``tokens``). Never shapes the result.
        needs: Packages that its payload imports beside what every installation has: looked for
            before anything is queued, and by the preflight.
        fits: Asked before anything is queued or started, with what this stage would get: raises
            `UserError` where that cannot carry it, and returns what a plan should tell.
    """

    name: str
    kind: Literal["map", "job"]
    inputs: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    load: Callable[[Context], Mapper] | None = None
    run: Callable[[Context], Counts | None] | None = None
    outputs: tuple[str, ...] = ()
    workers: int = 1
    resources: str = "cpu"
    gpus: int | None = 1
    distributed: bool = False
    error_limit: float = 0.0
    unless: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()
    needs: tuple[Package, ...] = ()
    fits: Callable[[Resources], str] | None = None

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of every stage this one waits for, without repeats."""
        return tuple(dict.fromkeys([*self.inputs.values(), *self.after]))
