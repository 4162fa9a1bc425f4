"""The processes of one training: how they find each other, and what they agree on.

Every rank runs the same program. Where something may go wrong on one of them only (a broken
row, a full disk), or only one of them knows (a signal), it runs inside `Ranks.every`: then all
go on together, or all end with the one line of the rank that failed.

Who they are stands in ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``MASTER_ADDR``, as torchrun
sets them and a batch job of several tasks does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from hpc.errors import UserError
from insightv.models import pick_device
from insightv.training.config import TrainConfig

T = TypeVar("T")

WRITING = timedelta(hours=1)
"""How long ranks wait for each other in a backend; the longest is for what one of them writes."""

PATIENCE = timedelta(days=7)
"""How long ranks wait in `Ranks.every`, while the first writes a model or computes reference
values. One that dies is noticed at once, by its connection."""


class Ranks:
    """This process among those of its training.

    What passes between ranks here are small JSON values, on processors; tensors pass in the
    backends.

    Attributes:
        rank: Its number, from 0.
        count: How many there are.
    """

    def __init__(self, group: Any = None):
        """Takes a gloo group of all ranks; without one there is this process alone."""
        self._group = group
        self._told: list[Exception] = []
        self.rank = 0 if group is None else distributed.get_rank()
        self.count = 1 if group is None else distributed.get_world_size()

    @property
    def lead(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def every(self, work: Callable[[], T]) -> list[T]:
        """Does a piece of work on every rank; none goes on before all are through.

        Args:
            work: Returns a JSON value (tuples come back as lists).

        Returns:
            The values of all ranks, in their order.

        Raises:
            UserError: ``work`` did, here. Other exceptions pass as well.
            SystemExit: It failed on another rank, which says why.
        """
        if self._group is None:
            return [work()]
        trouble: Exception | None = None
        value = None
        try:
            value = work()
        except Exception as error:
            if error in self._told:  # by an `every` inside this one, which all ranks have left
                raise
            trouble = error
        status = 0 if trouble is None else 2 if isinstance(trouble, UserError) else 1
        told = self._exchanged([status, value])
        failed = [rank for rank, (status, _) in enumerate(told) if status]
        if trouble is not None and (self.rank == failed[0] or status == 1):
            self._told.append(trouble)
            raise trouble
        if failed:
            raise SystemExit(told[failed[0]][0])
        return [value for _, value in told]

    def first(self, work: Callable[[], T]) -> T:
        """Does a piece of work on the first rank; the others wait for its value."""
        found: Any = self.every(lambda: work() if self.lead else None)[0]
        made: T = found
        return made

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank; the answer is the same on all."""
        return any(self.every(lambda: flag))

    def aside(self) -> Ranks:
        """The same ranks over connections of their own, for another thread; all must call it."""
        if self._group is None:
            return self
        return Ranks(distributed.new_group(backend="gloo", timeout=PATIENCE))

    def _exchanged(self, value: Any) -> list[Any]:
        """Every rank's value; as JSON, since unpickling runs what it is given."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.count)]
        distributed.all_gather(lengths, torch.tensor([len(data)]), group=self._group)
        padded = torch.zeros(int(torch.cat(lengths).max()), dtype=torch.uint8)
        padded[: len(data)] = data
        found: list[Tensor] = [torch.empty_like(padded) for _ in range(self.count)]
        distributed.all_gather(found, padded, group=self._group)
        return [
            json.loads(one[: int(length)].numpy().tobytes())
            for one, length in zip(found, lengths, strict=True)
        ]


@contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """Finds the other processes of a training, and sets this one's device.

    Inside another `joined` it is the same ranks. A process by itself gets a group of its own
    only where its backend asks for one.

    Raises:
        UserError: The others cannot be reached, the device is not there, or the backend
            cannot use so many.
    """
    if distributed.is_initialized():
        yield _joined()
        return
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        _check(config, count)
        if config.backend == "torch":
            yield Ranks()
            return
    cuda = pick_device(config.device).startswith("cuda")
    if cuda:
        # Slurm may show each task its own GPU only.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    alone: dict[str, Any] = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=WRITING,
            **(alone if count == 1 else {}),
        )
    except (ValueError, RuntimeError) as error:
        place = os.environ.get("MASTER_ADDR", "(no MASTER_ADDR)")
        why = str(error).splitlines()[0]
        raise UserError(
            f"the {count} processes of this training do not find each other at {place}: {why}; "
            "start them with torchrun, or as tasks of one Slurm job"
        ) from None
    ranks = _joined()
    try:
        ranks.first(lambda: _check(config, count))
        yield ranks
    except BaseException:
        if count == 1:
            distributed.destroy_process_group()
        raise  # with others, leaving might wait for work that they have given up
    distributed.destroy_process_group()


def _joined() -> Ranks:
    if distributed.get_world_size() == 1:
        return Ranks()
    return Ranks(distributed.new_group(backend="gloo", timeout=PATIENCE))


def _check(config: TrainConfig, count: int) -> None:
    """Refuses a number of processes that the backend cannot divide its work among."""
    if config.backend == "torch" and count > 1:
        raise UserError(
            f"backend=torch trains in one process, and {count} were started: give "
            "backend=megatron or backend=deepspeed, or start one"
        )
    if config.backend == "megatron":
        config.megatron.data_parallel(count)
