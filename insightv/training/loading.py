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
from typing import NamedTuple

from hpc.errors import UserError
from hpc.stages import Row
from insightv.training.batches import Example, Members, Rows, encode_all
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
        most: How many samples the copy with the most has.
        flops: Operations that the global batch's samples cost (`balance.Cost`).
    """

    batches: list[Batch] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    dropped: dict[str, str] = field(default_factory=dict)
    trees: list[Tree] = field(default_factory=list)
    most: int = 0
    flops: float = 0.0


class Measure(NamedTuple):
    """What a plan must know of a tree.

    Attributes:
        key: Of its first sample.
        unit: The number of the unit it is of.
        place: Which of the unit's trees it is.
        length: Its tokens.
        cost: Operations (`balance.Cost`).
        samples: How many samples it holds.
    """

    key: str
    unit: int
    place: int
    length: int
    cost: float
    samples: int


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
        pictures = rows.pictures if config.share_pictures else None
        self._members = Members(config.seed, len(rows), config.batch_size, config.epochs, pictures)

    def __call__(self, step: int) -> Step:
        """Prepares a step, counted from 0.

        Raises:
            UserError: A row is no training sample.
            SystemExit: The same, on another rank.
        """
        units = self._units(self._members(step))
        trees: dict[tuple[int, int], Tree] = {}
        reports = self.ranks.every(lambda: self._measured(units, trees))
        # By key, so that the order of rows and of ranks changes no sum.
        found = sorted(Measure(*told) for measured, _ in reports for told in measured)
        dropped = {key: reason for _, lost in reports for key, reason in lost.items()}
        if not found:
            return Step(dropped=dropped)
        plans = self.packer.plan(
            [one.length for one in found], [one.cost for one in found], self.copies
        )
        plan = plans[self.copy]
        batches: list[Batch] = []

        def tree(number: int) -> Tree:
            one = found[number]
            if (one.unit, one.place) not in trees:
                trees[one.unit, one.place] = self._again(one, units[one.unit], dropped)
            return trees[one.unit, one.place]

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
            max(sum(found[number].samples for number in _numbers(one)) for one in plans),
            math.fsum(one.cost for one in found),
        )

    def _units(self, members: list[int]) -> list[list[int]]:
        """Rows that may share a tree, which one rank measures together."""
        if not self.config.share_pictures:
            return [[number] for number in members]
        units: dict[int, list[int]] = {}
        for number in members:
            units.setdefault(int(self.rows.pictures[number]), []).append(number)
        return list(units.values())

    def _measured(
        self, units: list[list[int]], trees: dict[tuple[int, int], Tree]
    ) -> tuple[list[Measure], dict[str, str]]:
        """This rank's share of a step, and what of it is dropped."""
        told: list[Measure] = []
        dropped: dict[str, str] = {}
        for unit in range(self.ranks.rank, len(units), self.ranks.count):
            made, lost = self._trees(units[unit])
            dropped |= lost
            for place, tree in enumerate(made):
                trees[unit, place] = tree
                cost = self.packer.cost(tree)
                told.append(
                    Measure(tree.keys[0], unit, place, len(tree.ids), cost, len(tree.samples))
                )
        return told, dropped

    def _again(self, one: Measure, unit: list[int], dropped: dict[str, str]) -> Tree:
        """A tree that another rank has measured."""
        made, lost = self._trees(unit)
        if new := lost.keys() - dropped.keys():
            key = min(new)
            raise UserError(
                f"sample {key} could be read by one process and not by another "
                f"({lost[key]}): check the file system"
            )
        return made[one.place]

    def _trees(self, unit: list[int]) -> tuple[list[Tree], dict[str, str]]:
        found, lost = encode_all([self.rows[number] for number in unit], self.encode)
        return self.packer.trees(found), lost


def _numbers(plan: list[Planned]) -> list[int]:
    return [number for one in plan if not one.idle for row in one.rows for number in row]
