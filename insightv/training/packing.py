"""The batch format of every backend: samples packed to a token budget, prefixes shared.

A sample becomes a *tree*: the tokens all its replies begin with (picture, question, the
replies' own common beginning) once, then what is left of each reply as a branch. A branch
sees the prefix and itself, never another branch; position ids go on from the prefix in each.
So winner and loser of a preference pair cost one picture and one question, with the numbers
of two separate sequences (arXiv 2410.20305, 2602.24082). Samples of one picture may share a
tree in the same way (`Packer.trees`). One reply alone is a prefix without branches.

Trees stand one behind the other in the rows of a micro-batch. Two numbers a token say who
sees whom: its segment and the segment it goes on from. `insightv.training.attention` turns
them into what a backend's attention takes.

Packing happens inside one optimizer step: which samples these are is settled before
(`insightv.training.batches.Members`), and where they land changes no result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from insightv import chats, models
from insightv.training.balance import Cost, plan
from insightv.training.batches import Example

PADDING = -1
"""The segment of padding: it sees itself only, so that no softmax is over nothing."""


class Span(NamedTuple):
    """A segment's place in its row, and that of the segment it goes on from (0, 0 if none)."""

    start: int
    stop: int
    prefix_start: int
    prefix_stop: int


@dataclass(frozen=True)
class Tree:
    """Examples of one picture, or a single one, laid out.

    Attributes:
        samples: The examples; their replies are numbered in this order.
        ids: Token ids: the prefix, then the branches.
        marks: Per-token marks of the model's family, as long as ``ids``.
        pictures: The pictures, all of them in the prefix.
        positions: [n], or [3, n] for M-RoPE.
        lengths: Tokens of the prefix and of each branch; equal replies are one branch.
        places: For each target, the index in ``ids`` of the token that predicts it.
        targets: Target token ids. One place may predict a target of several replies.
        owners: For each target, the number of its reply.
        replies: How many replies.
        unshared: Tokens the replies would have as sequences of their own.
    """

    samples: tuple[Example, ...]
    ids: list[int]
    marks: dict[str, list[int]]
    pictures: tuple[chats.EncodedPicture, ...]
    positions: Tensor
    lengths: tuple[int, ...]
    places: list[int]
    targets: list[int]
    owners: list[int]
    replies: int
    unshared: int

    @classmethod
    def of(cls, samples: Sequence[Example], positions: Callable[[chats.Encoding], Tensor]) -> Tree:
        """Lays examples out.

        Args:
            samples: All their replies begin with the same pictures.
            positions: Position ids of one sequence, [n] or [3, n] (`chats.positions`).
        """
        replies = [reply for sample in samples for reply in sample.replies]
        encodings = [reply.encoding for reply in replies]
        first = encodings[0]
        prefix = min(chats.common(first.ids, encoding.ids) for encoding in encodings)
        ids, marks = first.ids[:prefix], {k: v[:prefix] for k, v in first.marks.items()}
        laid = [positions(first)[..., :prefix]]
        lengths = [prefix]
        places: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        branches: dict[tuple[int, ...], int] = {}
        for number, reply in enumerate(replies):
            encoding = reply.encoding
            branch = tuple(encoding.ids[prefix:])
            start = branches.setdefault(branch, len(ids))
            # Where a token of this reply stands in the tree: its prefix, or its own branch.
            moved = start - prefix
            for begin, stop in reply.spans:
                # The token at p is predicted at p - 1; a span never starts at 0, a prompt does.
                sources = range(begin - 1, stop - 1)
                places += [at if at < prefix else at + moved for at in sources]
                targets += encoding.ids[begin:stop]
                owners += [number] * (stop - begin)
            if start == len(ids) and branch:
                ids = ids + encoding.ids[prefix:]
                for name, values in marks.items():
                    values += encoding.marks[name][prefix:]
                laid.append(positions(encoding)[..., prefix:])
                lengths.append(len(encoding.ids) - prefix)
        return cls(
            samples=tuple(samples),
            ids=ids,
            marks=marks,
            pictures=first.pictures,
            positions=torch.cat(laid, dim=-1),
            lengths=tuple(lengths),
            places=places,
            targets=targets,
            owners=owners,
            replies=len(replies),
            unshared=sum(len(encoding.ids) for encoding in encodings),
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The examples'."""
        return tuple(sample.key for sample in self.samples)

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs attention computes."""
        prefix, *branches = self.lengths
        causal = sum(length * (length + 1) // 2 for length in self.lengths)
        return causal + prefix * sum(branches)


def _size(samples: Sequence[Example]) -> float:
    """Tokens of a tree of examples; infinite where they share no pictures to begin with."""
    if len({sample.pictures for sample in samples}) > 1:
        return math.inf
    encodings = [reply.encoding for sample in samples for reply in sample.replies]
    first = encodings[0]
    prefix = min(chats.common(first.ids, encoding.ids) for encoding in encodings)
    if prefix < max(encoding.opening for encoding in encodings):
        return math.inf
    return prefix + sum(len(ids) - prefix for ids in {tuple(one.ids) for one in encodings})


@dataclass(frozen=True)
class Batch:
    """A micro-batch as plain tensors: R rows of W tokens.

    Targets are listed, not laid out as labels: target t is predicted by the hidden state at
    flat position ``places[t]`` of the R × W inputs and belongs to reply ``owners[t]``. So
    logits are computed where they count only, and the last token of a shared prefix predicts
    the first token of every branch.

    Attributes:
        inputs: What the model takes: ``input_ids`` [R, W], ``position_ids`` [R, W] or
            [3, R, W], marks [R, W], the pictures' tensors in the order of the rows.
        segments: [R, W] number of each token's segment in its row; `PADDING` where none is.
        prefixes: [R, W] the segment it goes on from; its own if from none.
        places: [T] indices into R × W.
        targets: [T] token ids.
        owners: [T] reply numbers, 0 … replies - 1, in the order of ``keys``.
        reference: [replies] log-probability sums under the reference; empty for SFT.
        replies: How many replies.
        keys: Keys of the examples.
        tokens: Tokens without padding, each shared one counted once.
        unshared: Tokens of the replies as sequences of their own.
        spans: The segments of each row once more, as ranges; empty ones are left out.
    """

    inputs: dict[str, Tensor]
    segments: Tensor
    prefixes: Tensor
    places: Tensor
    targets: Tensor
    owners: Tensor
    reference: Tensor
    replies: int
    keys: tuple[str, ...]
    tokens: int
    unshared: int
    spans: tuple[tuple[Span, ...], ...]

    @property
    def width(self) -> int:
        """Tokens of a row, padding included."""
        return self.segments.shape[1]

    @property
    def efficiency(self) -> float:
        """Share of the R × W places that hold a token."""
        return self.tokens / self.segments.numel()

    def to(self, device: str) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, inputs=moved, **tensors)

    def idle(self) -> Batch:
        """The same inputs without a target: what a rank runs when it has no work of its own.

        Its share of any loss is 0, its gradients are zeros.
        """
        none = {name: getattr(self, name)[:0] for name in ("places", "targets", "owners")}
        return replace(
            self, **none, reference=self.reference[:0], replies=0, keys=(), tokens=0, unshared=0
        )


def collate(
    rows: Sequence[Sequence[Tree]], pad_token: int, multiple: int = 1, least: int = 0
) -> Batch:
    """One micro-batch from the trees of its rows.

    Args:
        rows: Trees in the order in which they stand in each row; no row is empty.
        pad_token: Fills what is left of a row.
        multiple: The width is rounded up to a multiple of this.
        least: Rows are at least so wide.
    """
    width = max(least, _width(rows))
    width = -(-width // multiple) * multiple
    trees = [tree for row in rows for tree in row]
    shape = (len(rows), width)
    ids = torch.full(shape, pad_token)
    marks = {name: torch.zeros(shape, dtype=torch.long) for tree in trees for name in tree.marks}
    axes = trees[0].positions.shape[:-1]
    positions = torch.zeros(*axes, *shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.int32)
    prefixes = torch.full(shape, PADDING, dtype=torch.int32)
    places: list[int] = []
    owners: list[int] = []
    replies = 0
    spans: list[tuple[Span, ...]] = []
    for number, row in enumerate(rows):
        start = segment = 0
        found: list[Span] = []
        for tree in row:
            stop = start + len(tree.ids)
            ids[number, start:stop] = torch.tensor(tree.ids)
            positions[..., number, start:stop] = tree.positions
            for name, values in tree.marks.items():
                marks[name][number, start:stop] = torch.tensor(values)
            numbers = torch.arange(segment, segment + len(tree.lengths), dtype=torch.int32)
            segments[number, start:stop] = numbers.repeat_interleave(torch.tensor(tree.lengths))
            prefixes[number, start:stop] = segment
            places += [number * width + start + at for at in tree.places]
            owners += [replies + owner for owner in tree.owners]
            found += _spans(tree, start)
            start, segment, replies = stop, segment + len(tree.lengths), replies + tree.replies
        spans.append(tuple(found))
    return Batch(
        inputs={
            "input_ids": ids,
            "position_ids": positions,
            **marks,
            **chats.picture_tensors([picture for tree in trees for picture in tree.pictures]),
        },
        segments=segments,
        prefixes=prefixes,
        places=torch.tensor(places, dtype=torch.long),
        targets=torch.tensor([token for tree in trees for token in tree.targets], dtype=torch.long),
        owners=torch.tensor(owners, dtype=torch.long),
        reference=torch.tensor(
            [value for tree in trees for sample in tree.samples for value in sample.reference],
            dtype=torch.float64,
        ),
        replies=replies,
        keys=tuple(key for tree in trees for key in tree.keys),
        tokens=sum(len(tree.ids) for tree in trees),
        unshared=sum(tree.unshared for tree in trees),
        spans=tuple(spans),
    )


def _width(rows: Sequence[Sequence[Tree]]) -> int:
    """Tokens of the longest row."""
    return max(sum(len(tree.ids) for tree in row) for row in rows)


def _spans(tree: Tree, start: int) -> list[Span]:
    """A tree's segments in a row in which it begins at ``start``."""
    prefix, *branches = tree.lengths
    shared = (start, start + prefix) if prefix else (0, 0)
    spans = [Span(*shared, 0, 0)] if prefix else []
    begin = start + prefix
    for length in filter(None, branches):
        spans.append(Span(begin, begin + length, *shared))
        begin += length
    return spans


class Planned(NamedTuple):
    """A micro-batch before it is made: the trees of its rows, by number."""

    rows: list[list[int]]
    idle: bool = False


class Packer:
    """Packs examples for one model."""

    def __init__(
        self,
        model: Any,
        pad_token: int,
        budget: int,
        ragged: bool = False,
        multiple: int = 1,
        alike: int = 0,
    ):
        """Knows how a model numbers positions and what its parts cost.

        Args:
            model: On any device; only its configuration and its weights' shapes are used.
            pad_token: Fills rows.
            budget: Places of a micro-batch, as in `pack`.
            ragged: As in `pack`.
            multiple: Rows are rounded up to a multiple of this (FlexAttention's blocks have
                128 tokens; sequence parallelism needs one of the ranks a row is cut over).
            alike: Above 0 the micro-batches of a rank's step are equally wide and their number
                is a multiple of this, as pipelines want.

        Raises:
            UserError: A packed row would mean something else to this family.
        """
        models.check_packable(model)
        self.pad_token, self.budget, self.ragged = pad_token, budget, ragged
        self.multiple, self.alike = multiple, alike
        self.positions = chats.positions(model)
        self.cost = Cost.of(model)

    def tree(self, example: Example) -> Tree:
        """An example, laid out for this model."""
        return Tree.of([example], self.positions)

    def trees(self, examples: Sequence[Example]) -> list[Tree]:
        """Lays out examples, those of the same pictures together where that saves tokens."""
        together: list[list[Example]] = []
        sizes: list[float] = []
        for example in examples:
            alone = _size([example])
            saved, best, grown = 0.0, len(together), alone
            for place, samples in enumerate(together):
                size = _size([*samples, example])
                if size <= self.budget and sizes[place] + alone - size > saved:
                    saved, best, grown = sizes[place] + alone - size, place, size
            if best == len(together):
                together.append([])
                sizes.append(0.0)
            together[best].append(example)
            sizes[best] = grown
        return [Tree.of(samples, self.positions) for samples in together]

    def alone(self, tree: Tree) -> Batch:
        """A micro-batch of one tree."""
        return collate([[tree]], self.pad_token, self.multiple)

    def plan(
        self, lengths: Sequence[int], costs: Sequence[float], ranks: int = 1
    ) -> list[list[Planned]]:
        """Each rank's micro-batches of a step; as many on every rank.

        Args:
            lengths: Tokens of each tree. Their order changes no result but the last bit of a
                sum: it must be the same wherever the plan is made.
            costs: Of each tree (`Packer.cost`).
            ranks: Data parallel copies of the model.
        """
        planned = plan(lengths, costs, self.budget, ranks, self.ragged)
        missing = -len(planned[0]) % max(self.alike, 1)
        cheapest = costs.index(min(costs))
        return [
            [
                Planned(rows) if rows else Planned([[cheapest]], idle=True)
                for rows in [*of_rank, *([[]] * missing)]
            ]
            for of_rank in planned
        ]

    def made(self, planned: Sequence[Planned], trees: Callable[[int], Tree]) -> list[Batch]:
        """The micro-batches of one rank's plan; ``trees`` gives each by its number."""
        rows = [[[trees(number) for number in row] for row in one.rows] for one in planned]
        least = max(map(_width, rows)) if self.alike else 0
        batches = [collate(one, self.pad_token, self.multiple, least) for one in rows]
        return [
            batch.idle() if one.idle else batch for one, batch in zip(planned, batches, strict=True)
        ]

    def batches(self, examples: Sequence[Example], rank: int = 0, ranks: int = 1) -> list[Batch]:
        """One rank's micro-batches of a step, where all its examples are at hand.

        The order in which they come changes nothing, not even the last bit of a sum.
        """
        ordered = sorted(examples, key=lambda one: one.key)
        return self.packed([self.tree(example) for example in ordered], rank, ranks)

    def packed(self, trees: Sequence[Tree], rank: int = 0, ranks: int = 1) -> list[Batch]:
        """One rank's micro-batches of trees that are all at hand."""
        lengths = [len(tree.ids) for tree in trees]
        planned = self.plan(lengths, [self.cost(tree) for tree in trees], ranks)
        return self.made(planned[rank], trees.__getitem__)
