"""Which tree goes to which rank and row: even work, little padding.

Nothing here changes a result: losses and gradients are sums over trees.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from insightv import models

if TYPE_CHECKING:
    from insightv.training.packing import Tree


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a training step's forward and backward pass, by part.

    A matrix of n weights costs 2n a token forward and 4n backward; a pair of attention costs
    4 × heads × head size a layer forward, twice that backward. What is frozen costs its forward
    pass. Embeddings, norms and softmax are left out, as is usual (arXiv 2001.08361, appendix B
    of arXiv 2204.02311).

    Attributes:
        token: Of one token in the language model, head excluded.
        pair: Of one (query, key) pair in all its layers.
        target: Of one target in the head.
        patch: Of one patch in the vision tower and the projector, attention left out.
        side: Pixels of a patch's side.
        pixels: Numbers that make a patch.
        look: Of one pair of patches in a layer of the vision tower.
        window: Patches of a window's side where some of its layers see windows only.
        whole: Layers of the tower that see a whole tile or picture.
        windowed: Its other layers.
    """

    token: float
    pair: float
    target: float
    patch: float
    side: int
    pixels: int
    look: float
    window: int
    whole: int
    windowed: int

    @classmethod
    def of(cls, model: Any) -> Cost:
        """Counts a model's weights; what requires no gradient is counted forward only."""
        text, vision = model.config.get_text_config(), model.config.vision_config
        head = model.get_output_embeddings().weight
        # Rows that are looked up, of tokens or places, are no products.
        apart = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
        apart.add(id(head))
        language = {id(weight) for weight in model.model.language_model.parameters()}
        merged = getattr(vision, "spatial_merge_size", 1) ** 2
        token = patch = 0.0
        for name, weight in model.named_parameters():
            if weight.ndim < 2 or id(weight) in apart:
                continue
            work = _passes(weight) * weight.numel()
            if id(weight) in language:
                token += work
            else:
                # Qwen's projector sees four patches at once.
                patch += work / merged if "merger" in name else work
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        side = vision.patch_size
        full = getattr(vision, "fullatt_block_indexes", None)
        layers = getattr(vision, "depth", None) or vision.num_hidden_layers
        whole = layers if full is None else len(full)
        tower = next(models.vision_tower(model).parameters())
        # In Qwen2-VL's configuration ``hidden_size`` is the language model's.
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        return cls(
            token=token,
            pair=6.0 * 2 * size * text.num_attention_heads * text.num_hidden_layers,
            target=_passes(head) * head.numel(),
            patch=patch,
            side=side,
            pixels=3 * side**2 * getattr(vision, "temporal_patch_size", 1),
            look=_passes(tower) * 2 * width,
            window=getattr(vision, "window_size", 0) // side,
            whole=whole,
            windowed=layers - whole,
        )

    def __call__(self, tree: Tree) -> float:
        """Operations for one tree."""
        return (
            self.token * len(tree.ids)
            + self.pair * tree.pairs
            + self.target * len(tree.targets)
            + sum(self._seen(picture.tensors) for picture in tree.pictures)
        )

    def _seen(self, picture: Mapping[str, Tensor]) -> float:
        """Operations for what the tower and the projector make of a picture."""
        pixels = picture["pixel_values"]
        if (grid := picture.get("image_grid_thw")) is not None:
            tiles = [tuple(row) for row in grid.reshape(-1, 3).tolist()]
        else:  # tiles of one size, each by itself
            height, width = pixels.shape[-2:]
            count = pixels.numel() // (3 * height * width)
            tiles = [(count, height // self.side, width // self.side)]
        pairs = sum(
            count * (self.whole * (rows * columns) ** 2)
            + count * self.windowed * _squares(rows, self.window) * _squares(columns, self.window)
            for count, rows, columns in tiles
        )
        return self.patch * pixels.numel() / self.pixels + self.look * pairs


def _squares(length: int, window: int) -> int:
    """The sum of the squares of the pieces that windows cut a length into."""
    if not window:
        return length**2
    return length // window * window**2 + (length % window) ** 2


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
