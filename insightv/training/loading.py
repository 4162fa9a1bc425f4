"""What each rank trains on in a step: planned together, read and prepared apart.

To plan a step, the length and cost of each of its samples must be known, and pictures make
both. So every rank measures its share of the step's samples; these numbers, and the reasons of
samples that cannot be used, go to all ranks, which make the same plan of them. Then each copy
of the model prepares the samples that the plan gives to it, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, field

from hpc.errors import UserError
from hpc.stages import Row
from insightv.training.batches import Example, Rows, encode_all, step_members
from insightv.training.config import TrainConfig
from insightv.training.objectives import Totals
from insightv.training.packing import Batch, Packer, Planned, Tree
from insightv.training.ranks import Ranks


@dataclass(frozen=True)
class Step:
    """What one copy of the model trains on in a step.

    Attributes:
        batches: Its micro-batches; none, on any copy, if no sample could be used.
        totals: Of the global batch.
        dropped: Samples of the global batch that could not be used: key → reason.
        trees: The copy's samples.
        most: How many the copy with the most has.
        flops: Operations that the global batch's samples cost (`balance.Cost`).
    """

    batches: list[Batch] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    dropped: dict[str, str] = field(default_factory=dict)
    trees: list[Tree] = field(default_factory=list)
    most: int = 0
    flops: float = 0.0


class Loader:
    """Prepares steps of a training."""

    def __init__(
        self,
        config: TrainConfig,
        rows: Rows,
        encode: Callable[[Row], Example],
        packer: Packer,
        ranks: Ranks,
        copies: int,
        copy: int,
    ):
        """Takes what a step is made of.

        Args:
            config: Seed, batch size and epochs say which rows a step has.
            rows: The training's.
            encode: From a row to an example.
            packer: The backend's.
            ranks: All of them ask for the same steps, in one order.
            copies: Copies of the model.
            copy: The one that this rank holds, or holds a part of.
        """
        self.config, self.rows, self.encode, self.packer = config, rows, encode, packer
        self.ranks, self.copies, self.copy = ranks, copies, copy

    def __call__(self, step: int) -> Step:
        """Prepares a step, counted from 0.

        Raises:
            UserError: A row is no training sample.
            SystemExit: The same, on another rank.
        """
        config = self.config
        members = step_members(config.seed, step, len(self.rows), config.batch_size, config.epochs)
        trees: dict[int, Tree] = {}
        reports = self.ranks.every(lambda: self._measured(members, trees))
        # By key, so that the order of rows and of ranks changes no sum.
        samples = sorted(
            (key, place, n, cost) for told, _ in reports for key, place, n, cost in told
        )
        dropped = {key: reason for _, lost in reports for key, reason in lost.items()}
        if not samples:
            return Step(dropped=dropped)
        plans = self.packer.plan(
            [length for _, _, length, _ in samples],
            [cost for _, _, _, cost in samples],
            self.copies,
        )
        plan = plans[self.copy]
        batches: list[Batch] = []

        def tree(number: int) -> Tree:
            key, place, *_ = samples[number]
            if place not in trees:
                trees[place] = self._again(key, members[place])
            return trees[place]

        def make() -> list[int]:
            batches.extend(self.packer.made(plan, tree))
            return list(astuple(Totals.of(batches)))

        counted = self.ranks.every(lambda: (self.copy, make()))
        of_copies = {copy: Totals(*numbers) for copy, numbers in counted}
        return Step(
            batches,
            sum(of_copies.values(), Totals()),
            dropped,
            [tree(number) for number in _numbers(plan)],
            max(len(_numbers(one)) for one in plans),
            math.fsum(cost for *_, cost in samples),
        )

    def _measured(
        self, members: list[int], trees: dict[int, Tree]
    ) -> tuple[list[tuple[str, int, int, float]], dict[str, str]]:
        """This rank's share of a step: key, place, length and cost of each; what is dropped."""
        told: list[tuple[str, int, int, float]] = []
        dropped: dict[str, str] = {}
        for place in range(self.ranks.rank, len(members), self.ranks.count):
            found, lost = encode_all([self.rows[members[place]]], self.encode)
            dropped |= lost
            for example in found:
                tree = trees[place] = self.packer.tree(example)
                told.append((tree.key, place, len(tree.ids), self.packer.cost(tree)))
        return told, dropped

    def _again(self, key: str, number: int) -> Tree:
        """A sample that another rank has measured."""
        found, lost = encode_all([self.rows[number]], self.encode)
        if lost:
            raise UserError(
                f"sample {key} could be read by one process and not by another "
                f"({lost[key]}): check the file system"
            )
        return self.packer.tree(found[0])


def _numbers(plan: list[Planned]) -> list[int]:
    return [number for one in plan if not one.idle for row in one.rows for number in row]
