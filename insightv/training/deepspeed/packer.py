"""Micro-batches in which all ranks train the same modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from insightv import chats
from insightv.training.packing import Batch, Packer, Planned, Tree

_BLANK = -1
"""The number of the tree that stands in where a micro-batch has no picture."""


class PicturePacker(Packer):
    """Packs so that every micro-batch shows the model a picture.

    What trains on one rank only would be waited for on the others. So where a micro-batch has no
    picture, a small blank one goes with it, seen by nobody and without targets: its gradients
    are zeros.
    """

    def __init__(self, model: Any, processor: Any, pad_token: int, budget: int):
        """As `Packer`; ``processor`` prepares the blank picture."""
        super().__init__(model, pad_token, budget)
        shown = chats.encode_picture(processor, Image.new("RGB", (56, 56)))
        self._blank = Tree(
            samples=(),
            ids=shown.ids,
            marks=shown.marks,
            pictures=(shown,),
            positions=self.positions(chats.Encoding(shown.ids, shown.marks, (shown,))),
            lengths=(len(shown.ids),),
            places=[],
            targets=[],
            owners=[],
            replies=0,
            unshared=len(shown.ids),
        )

    def alone(self, tree: Tree) -> Batch:
        """As `Packer.alone`."""
        return self.made([Planned([[0]])], lambda number: tree)[0]

    def made(self, planned: Sequence[Planned], trees: Callable[[int], Tree]) -> list[Batch]:
        """As `Packer.made`."""

        def tree(number: int) -> Tree:
            return self._blank if number == _BLANK else trees(number)

        def shown(one: Planned) -> Planned:
            if any(trees(number).pictures for row in one.rows for number in row):
                return one
            rows = sorted(one.rows, key=lambda row: sum(len(trees(n).ids) for n in row))
            return one._replace(rows=[*rows[1:], [*rows[0], _BLANK]])

        return super().made([shown(one) for one in planned], tree)
