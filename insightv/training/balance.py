"""Which tree goes to which rank and row: even work, little padding.

Nothing here changes a result: losses and gradients are sums over trees.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from insightv.training.packing import Tree


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a training step's forward and backward pass, by part.

    A matrix of n weights costs 2n a token forward and 4n backward; a pair of attention costs
    4 × heads × head size a layer forward, twice that backward. Embeddings, norms and softmax
    are left out, as is usual (arXiv 2001.08361, appendix B of arXiv 2204.02311).

    Attributes:
        token: Of one token in the language model, head excluded.
        pair: Of one (query, key) pair in all its layers.
        target: Of one target in the head.
        patch: Of one patch in the vision tower and the projector, attention left out.
        pixels: Numbers that make a patch.
    """

    token: float
    pair: float
    target: float
    patch: float
    pixels: int

    @classmethod
    def of(cls, model: Any) -> Cost:
        """Counts a model's weights; what requires no gradient is counted forward only."""
        text, vision = model.config.get_text_config(), model.config.vision_config
        head = model.get_output_embeddings().weight
        apart = {id(head), id(model.get_input_embeddings().weight)}
        language = {id(weight) for weight in model.model.language_model.parameters()}
        token = patch = 0.0
        for weight in model.parameters():
            if weight.ndim < 2 or id(weight) in apart:
                continue
            work = _passes(weight) * weight.numel()
            if id(weight) in language:
                token += work
            else:
                patch += work
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        pair = 3 * 4 * size * text.num_attention_heads * text.num_hidden_layers
        pixels = 3 * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1)
        return cls(token, float(pair), _passes(head) * head.numel(), patch, pixels)

    def __call__(self, tree: Tree) -> float:
        """Operations for one tree."""
        pixels = sum(
            tensor.numel()
            for picture in tree.pictures
            for name, tensor in picture.tensors.items()
            if name == "pixel_values"
        )
        return (
            self.token * len(tree.ids)
            + self.pair * tree.pairs
            + self.target * len(tree.targets)
            + self.patch * pixels / self.pixels
        )


def _passes(weight: Tensor) -> float:
    return 6.0 if weight.requires_grad else 2.0


def pack(lengths: Sequence[int], budget: int, ragged: bool = False) -> list[list[list[int]]]:
    """Cuts trees into micro-batches of rows: first fit, the longest first.

    Args:
        lengths: Tokens of each tree.
        budget: Places (rows × width) of a micro-batch; a tree longer than that goes alone.
        ragged: One row of up to ``budget`` tokens a micro-batch, for masks whose cost is that
            of what is seen. Otherwise as many rows as fit of the width of their longest tree:
            a dense mask costs width² a row, seen or not.

    Returns:
        Micro-batches of rows of indices into ``lengths``. Equal lengths stand in their order.
    """
    batches: list[tuple[int, list[list[int]]]] = []
    rooms: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        length = lengths[index]
        place = next((at for at, (room, _) in enumerate(rooms) if room >= length), None)
        if place is not None:
            room, row = rooms[place]
            row.append(index)
            rooms[place] = (room - length, row)
            continue
        # A new row where rows are not much wider than the tree; else a new micro-batch.
        if batches and not ragged:
            width, rows = batches[-1]
            if (len(rows) + 1) * width <= budget and width < 2 * length:
                rows.append([index])
                rooms.append((width - length, rows[-1]))
                continue
        width = max(length, budget) if ragged else length
        batches.append((width, [[index]]))
        rooms.append((width - length, batches[-1][1][0]))
    return [rows for _, rows in batches]


def plan(
    lengths: Sequence[int],
    costs: Sequence[float],
    budget: int,
    ranks: int = 1,
    ragged: bool = False,
) -> list[list[list[list[int]]]]:
    """Spreads a step's trees over data-parallel ranks and packs each rank's share.

    Every rank gets about the same cost (the dearest first, each to the rank that has least)
    and the same number of micro-batches, since ranks that exchange gradients or weights a
    micro-batch wait for each other. It is the same plan wherever it is computed.

    Args:
        lengths: Tokens of each tree.
        costs: What each tree costs (`Cost`).
        budget: As in `pack`.
        ranks: How many.
        ragged: As in `pack`.

    Returns:
        For each rank its micro-batches, of rows, of indices into ``lengths``. A micro-batch
        without rows is one that the rank idles through (`Batch.idle`).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda one: (-costs[one], one)):
        spent, rank = heapq.heappop(least)
        shares[rank].append(index)
        heapq.heappush(least, (spent + costs[index], rank))
    planned = []
    for share in shares:
        share.sort()
        cut = pack([lengths[index] for index in share], budget, ragged)
        planned.append([[[share[index] for index in row] for row in rows] for rows in cut])
    most = max(map(len, planned))
    for batches in planned:
        while len(batches) < most and (halves := _halved(batches)) is not None:
            batches[:] = halves
        batches += [[] for _ in range(most - len(batches))]
    return planned


def _halved(batches: list[list[list[int]]]) -> list[list[list[int]]] | None:
    """One micro-batch more, by halving the one with the most trees; None if all have one."""
    sizes = [sum(map(len, rows)) for rows in batches]
    if not sizes or max(sizes) < 2:
        return None
    at = sizes.index(max(sizes))
    rows = batches[at]
    if len(rows) > 1:
        left, right = rows[::2], rows[1::2]
    else:
        left, right = [rows[0][::2]], [rows[0][1::2]]
    return [*batches[:at], left, right, *batches[at + 1 :]]
