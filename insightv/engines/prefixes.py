"""What a model has read and written is remembered, so that nobody reads it twice.

The next step of a path goes on from the one before, and the paths of a question from its picture
and its words. What begins like something remembered is read from where they part. Remembered are
keys and values, in spans: one holds the tokens behind those of its parent, so that what paths
have in common is there once. Nothing else is kept from one batch to the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from insightv import chats
from insightv.engines.states import RoomyLayer, roomy

_BLOCK = 4
"""Spans are found by the hashes of their first 4, 8, 12, … tokens."""
_ALIKE = 0.5
"""A prompt goes on from what is remembered if that is this share of it, or more."""

Pictures = tuple[str, ...]
_Key = tuple[Pictures, int]


@dataclass(eq=False)
class Span:
    """Keys and values of some tokens.

    Attributes:
        ids: All tokens from the first of the prompt on.
        start: How many of them are the parent's.
        place: Position of the token behind the last one.
        states: Of the tokens from ``start`` on: (layers, 2, heads, tokens, size), keys first.
        parent: Holds, itself or by its own parent, the first ``start`` tokens; None if 0.
        keys: Under which hashes it is found.
    """

    ids: list[int]
    start: int
    place: int
    states: torch.Tensor
    parent: Span | None = None
    keys: list[_Key] = field(default_factory=list)

    def place_at(self, length: int) -> int:
        """Position of the token behind the first ``length``, which hold all pictures."""
        return self.place - (len(self.ids) - length)

    def pieces(self, length: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Whence, whereto and what: the states of the first ``length`` tokens, last ones first."""
        span: Span | None = self
        while span is not None:
            if length > span.start:
                yield span.start, length, span.states[..., : length - span.start, :]
                length = span.start
            span = span.parent


Begun = tuple[Span, int]
"""A span, and how many of its first tokens count."""


class Prefixes:
    """Spans, up to a number of tokens; the least recently used go first."""

    def __init__(self, model: Any):
        """Nothing is remembered yet; of a model with layers that forget, nothing ever is."""
        layers = DynamicCache(config=model.config).layers
        self.possible = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
        self.tokens = 0
        self._room = 0
        self._spans: OrderedDict[Span, None] = OrderedDict()
        self._index: dict[_Key, Span] = {}

    def clear(self) -> None:
        """Forgets everything."""
        self.limit(0)

    def limit(self, tokens: int) -> None:
        """Remembers so many tokens and no more, from now on."""
        self._room = tokens
        while self._spans and self.tokens > self._room:
            # Whoever uses a span uses its parent after it: the oldest one has no children.
            span, _ = self._spans.popitem(last=False)
            self.tokens -= len(span.ids) - span.start
            for key in span.keys:
                if self._index.get(key) is span:
                    del self._index[key]

    def find(self, pictures: Pictures, ids: list[int], opening: int) -> Begun | None:
        """What a prompt can go on from: at least its pictures, and not the whole of it."""
        span = None
        for key in _keys(pictures, ids):
            if key not in self._index:
                break
            span = self._index[key]
        if span is None:
            return None
        length = min(chats.common(span.ids, ids), len(ids) - 1)
        if length < max(opening, _ALIKE * len(ids)):
            return None
        self._use(span)
        return span, length

    def add(
        self,
        pictures: Pictures,
        ids: list[int],
        place: int,
        cache: Any,
        row: int,
        columns: torch.Tensor,
        begun: Begun | None = None,
    ) -> Begun | None:
        """Remembers a row of a cache.

        Args:
            pictures: The prompt's.
            ids: The row's tokens.
            place: Position of the token behind them.
            cache: Where their keys and values are.
            row: In which row of it,
            columns: and in which columns, of all tokens, or more.
            begun: What the row went on from.

        Returns:
            What else can go on from it.
        """
        if not self.possible:
            return None
        parent, start = begun or (None, 0)
        keys = _keys(pictures, ids)[start // _BLOCK :]
        known = self._index.get(keys[-1]) if keys else None
        if known is not None and known.ids[: len(ids)] == ids:
            self._use(known)
            return known, len(ids)
        own = columns[start : len(ids)]
        states = torch.stack(
            [
                torch.stack(
                    [held[row].index_select(-2, own) for held in (layer.keys, layer.values)]
                )
                for layer in cache.layers
            ]
        )
        span = Span(ids, start, place, states, parent, keys)
        # A child of one that was forgotten would keep it, uncounted.
        if keys and (parent is None or parent in self._spans):
            self._index.update(dict.fromkeys(keys, span))
            self.tokens += len(ids) - start
            self._use(span)
            self.limit(self._room)
        return span, len(ids)

    def _use(self, span: Span | None) -> None:
        while span is not None:
            self._spans[span] = None
            self._spans.move_to_end(span)
            span = span.parent


def resumed(begun: Sequence[Begun], more: int) -> tuple[DynamicCache, torch.Tensor]:
    """A cache that goes on from these.

    Args:
        begun: One for each row.
        more: How many tokens are to come at first.

    Returns:
        The cache, padded on the left, and its mask.
    """
    width = max(length for _, length in begun)
    first = begun[0][0].states
    layers, pair, heads, _, size = first.shape
    shape = (pair, len(begun), heads, roomy(width + more), size)
    rooms = [first.new_zeros(shape) for _ in range(layers)]
    mask = torch.zeros(len(begun), width, dtype=torch.long)
    for row, (span, length) in enumerate(begun):
        gap = width - length
        mask[row, gap:] = 1
        for start, end, states in span.pieces(length):
            for room, held in zip(rooms, states, strict=True):
                room[:, row, :, gap + start : gap + end] = held
    cache = DynamicCache()
    cache.layers = [RoomyLayer(keys, values, width) for keys, values in rooms]
    return cache, mask.to(first.device)


def _keys(pictures: Pictures, ids: list[int]) -> list[_Key]:
    """Hashes of the first 4, 8, 12, … tokens, with their pictures."""
    keys = []
    key = 0
    for end in range(_BLOCK, len(ids) + 1, _BLOCK):
        key = hash((key, *ids[end - _BLOCK : end]))
        keys.append((pictures, key))
    return keys
