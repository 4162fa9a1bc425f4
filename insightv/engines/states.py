"""Keys and values of the rows under way: rows leave, others join, and each step finds room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

Part = tuple[Any, torch.Tensor]
"""A cache and its mask, shape (rows, tokens): 0 where there is padding."""


class RoomyLayer(DynamicLayer):
    """Keys and values with room behind them: a step writes its own instead of copying all."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        """Takes over keys and values, shape (rows, heads, tokens, size), so many of them filled."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._rooms = [keys, values]
        self.keys: torch.Tensor = keys[..., :length, :]
        self.values: torch.Tensor = values[..., :length, :]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new tokens' keys and values, shape (rows, heads, new, size); returns all so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._rooms[0].shape[-2]:
            self._rooms = [_enlarged(held, roomy(end)) for held in (self.keys, self.values)]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., start:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values

    def reset(self) -> None:
        """Gives its memory back."""
        super().reset()
        self._rooms = []

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Goes on with these rows only; the next step makes room."""
        super().batch_select_indices(indices)
        self._rooms = [self.keys, self.values]


def roomy(length: int) -> int:
    """How much is set aside for so many tokens."""
    return length + max(64, length // 4)


def _enlarged(held: torch.Tensor, size: int) -> torch.Tensor:
    room = held.new_empty((*held.shape[:-2], size, held.shape[-1]))
    room[..., : held.shape[-2], :] = held
    return room


def keeps_all(cache: Any) -> bool:
    """Whether all layers hold the keys and values of all tokens, so that rows can be joined."""
    kinds = (DynamicLayer, RoomyLayer)
    return bool(cache.layers) and all(
        type(layer) in kinds and layer.keys is not None for layer in cache.layers
    )


def with_room(cache: Any) -> None:
    """Gives room to the layers that keep everything; those of other kinds stay as they are."""
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[place] = RoomyLayer(layer.keys, layer.values, layer.keys.shape[-2])


def with_rows(part: Part, rows: torch.Tensor) -> Part:
    """Goes on with these rows of a cache, in this order; any of them may come several times."""
    if keeps_all(part[0]):
        return packed([part], [rows])
    cache, mask = part
    cache.batch_select_indices(rows)
    return cache, mask[rows]


def fits(part: Part, more: Part) -> bool:
    """Whether rows of a cache could be replaced by those of another one, and should.

    Not if those are longer, or a quarter of all columns or more is of rows that are gone.
    """
    width = part[1].shape[1]
    empty = int(part[1].any(0).int().argmax())
    return more[1].shape[1] <= width and 4 * empty < width


def replace(part: Part, rows: torch.Tensor, more: Part) -> None:
    """Puts the rows of another cache, no longer than this one's, in the place of these."""
    cache, mask = part
    start = mask.shape[1] - more[1].shape[1]
    for layer, new in zip(cache.layers, more[0].layers, strict=True):
        layer.keys[rows, :, start:] = new.keys
        layer.values[rows, :, start:] = new.values
    mask[rows, :start] = 0
    mask[rows, start:] = more[1]


def packed(parts: Sequence[Part], rows: Sequence[torch.Tensor | None]) -> Part:
    """One cache of rows of several, padded on the left no more than the longest row asks for.

    Args:
        parts: Caches whose layers keep everything. They are used up: the memory of a layer is
            given back before that of the next one is asked for.
        rows: Which rows are taken of each, in which order; None: all.
    """
    masks = [mask if own is None else mask[own] for (_, mask), own in zip(parts, rows, strict=True)]
    # Columns in which nobody has anything any more.
    gaps = [int(mask.any(0).int().argmax()) for mask in masks]
    masks = [mask[:, gap:] for mask, gap in zip(masks, gaps, strict=True)]
    width = max(mask.shape[1] for mask in masks)

    def together(held: Sequence[torch.Tensor]) -> torch.Tensor:
        first = held[0]
        count = sum(map(len, masks))
        room = first.new_empty((count, first.shape[1], roomy(width), first.shape[3]))
        start = 0
        for states, own, gap, mask in zip(held, rows, gaps, masks, strict=True):
            lines = room[start : start + len(mask)]
            # Padding is not attended to, yet must be numbers.
            lines[:, :, : width - mask.shape[1]] = 0
            into = lines[:, :, width - mask.shape[1] : width]
            shown = states[:, :, gap:]
            into.copy_(shown if own is None else shown[own])
            start += len(mask)
        return room

    cache = DynamicCache()
    for number in range(len(parts[0][0].layers)):
        layers = [part[0].layers[number] for part in parts]
        keys = together([layer.keys for layer in layers])
        values = together([layer.values for layer in layers])
        cache.layers.append(RoomyLayer(keys, values, width))
        for layer in layers:
            layer.reset()
    wide = [torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks]
    return cache, torch.cat(wide)
