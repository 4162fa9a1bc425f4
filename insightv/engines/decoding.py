"""Decoding rows that come and go, each with its own sampling, seed, stop strings and limit.

One loop over the model's ``forward`` instead of ``generate``, for two reasons. The paths of a
question start alike, and go on from what they wrote: that is read once, and its keys and values
are then shared out (``prefixes``); and rows that are done leave, so that others take their places,
where ``generate`` carries them to the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from insightv.chats import Encoding, collate
from insightv.engines import states
from insightv.engines.base import Request
from insightv.engines.prefill import Positions, read_prompts
from insightv.engines.prefixes import Begun, Prefixes
from insightv.engines.rows import RowSampler, RowStopper

_KEEP = 0.75
"""Rows leave, and others may come, when no more than this share of all goes on."""


@dataclass(eq=False)
class Call:
    """What one row is to be.

    Attributes:
        request: What was asked.
        encoding: Its prompt.
        limit: The most tokens of its reply.
    """

    request: Request
    encoding: Encoding
    limit: int


Asked = TypeVar("Asked", bound=Call)


@dataclass(eq=False)
class _Batch(Generic[Asked]):
    """Rows under way, each with a token that the model has not read yet.

    Attributes:
        calls: What the rows are.
        begun: What is remembered of their prompts,
        places: and the positions behind those.
        cache: Keys and values.
        mask: 0 where there is padding, shape (rows, tokens).
        positions: Of the next tokens.
        sampler: Draws them.
        stopper: Ends the rows.
        token: The last ones drawn, shape (rows,).
    """

    calls: list[Asked]
    begun: list[Begun | None]
    places: list[int]
    cache: Any
    mask: torch.Tensor
    positions: Positions
    sampler: RowSampler
    stopper: RowStopper
    token: torch.Tensor

    def draw(self, logits: torch.Tensor) -> None:
        """Draws the rows' next tokens from logits, shape (rows, vocabulary)."""
        self.token = self.sampler(logits.float())
        self.stopper(self.token)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with these rows only."""
        self.cache, self.mask = states.with_rows((self.cache, self.mask), rows)
        self._keep(rows)

    def _keep(self, rows: torch.Tensor) -> None:
        """Goes on with all that these rows have beside keys and values."""
        for name in ("calls", "begun", "places"):
            held = getattr(self, name)
            setattr(self, name, [held[row] for row in rows.tolist()])
        self.token = self.token[rows]
        for each in (self.positions, self.sampler, self.stopper):
            each.select(rows)

    def take_in(self, more: _Batch[Asked]) -> None:
        """Goes on with the rows of another one: in the place of those that are done, if all fit."""
        ended = self.stopper.ended()
        free = ended.nonzero()[:, 0]
        parts = (self.cache, self.mask), (more.cache, more.mask)
        if len(free) < len(more.calls) or not states.fits(*parts):
            kept = (~ended).nonzero()[:, 0]
            self.cache, self.mask = states.packed(parts, [kept, None])
            self._keep(kept)
            self._add(more)
            return
        rows = free[: len(more.calls)]
        for name in ("calls", "begun", "places"):
            held = getattr(self, name)
            for row, value in zip(rows.tolist(), getattr(more, name), strict=True):
                held[row] = value
        states.replace(parts[0], rows, parts[1])
        self.token[rows] = more.token
        self.positions.replace(rows, more.positions)
        self.sampler.replace(rows, more.sampler)
        self.stopper.replace(rows, more.stopper)
        if len(rows) < len(free):
            stay = torch.ones_like(ended)
            stay[free[len(rows) :]] = False
            self.select(stay.nonzero()[:, 0])

    def _add(self, more: _Batch[Asked]) -> None:
        """Goes on with all that the rows of another one have beside keys and values, too."""
        self.calls += more.calls
        self.begun += more.begun
        self.places += more.places
        self.token = torch.cat([self.token, more.token])
        self.positions.join(more.positions)
        self.sampler.join(more.sampler)
        self.stopper.join(more.stopper)


class Decoder(Generic[Asked]):
    """Rows on their way through a model."""

    def __init__(self, model: Any, tokenizer: Any, ends: Sequence[int]):
        """Takes any picture-and-text decoder of transformers.

        Args:
            model: The model.
            tokenizer: The model's.
            ends: Tokens that end a turn.
        """
        self.prefixes = Prefixes(model)
        self._model, self._tokenizer, self._ends = model, tokenizer, list(ends)
        self._options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
        self._batch: _Batch[Asked] | None = None

    @property
    def open(self) -> bool:
        """Whether others may join the rows under way: not where a layer forgets tokens."""
        return self._batch is None or states.keeps_all(self._batch.cache)

    def clear(self) -> None:
        """Forgets the rows under way, and all that was remembered."""
        self._batch = None
        self.prefixes.clear()

    @torch.inference_mode()
    def run(self, calls: Sequence[Asked]) -> list[tuple[Asked, list[int]]]:
        """Goes on with the rows under way and these, until some are done.

        Args:
            calls: Rows to begin; none unless ``open``.

        Returns:
            The rows that are done, with their new tokens, the ending ones included.
        """
        batch = self._batch
        fresh = self._begin(list(calls)) if calls else None
        if batch is None:
            batch = fresh
        elif fresh is not None:
            batch.take_in(fresh)
        else:
            batch.select((~batch.stopper.ended()).nonzero()[:, 0])
        if batch is None:
            return []
        padded = not bool(batch.mask.all())
        while True:
            ended = batch.stopper.ended()
            done: list[int] = ended.nonzero()[:, 0].tolist()
            going = len(ended) - len(done)
            if going <= _KEEP * len(ended):
                break
            self._step(batch, padded)
        # Whose place is not taken the next time leaves then.
        self._batch = batch if going else None
        return [self._reply(batch, row) for row in done]

    def _begin(self, calls: list[Asked]) -> _Batch[Asked]:
        """Reads prompts, those that are the same once, and draws the first tokens."""
        prompts: dict[tuple[tuple[int, ...], tuple[str, ...]], Encoding] = {}
        keys = [(tuple(call.encoding.ids), call.request.pictures) for call in calls]
        for key, call in zip(keys, calls, strict=True):
            prompts.setdefault(key, call.encoding)
        numbers = {key: number for number, key in enumerate(prompts)}
        owners = [numbers[key] for key in keys]
        positions = Positions(self._model)
        pad = self._tokenizer.pad_token_id
        read = read_prompts(
            self._model,
            list(prompts.values()),
            [pictures for _, pictures in prompts],
            pad,
            positions,
            self._options,
            self.prefixes,
        )
        rows = torch.tensor(owners, device=read.mask.device)
        cache, mask, logits = read.cache, read.mask, read.logits
        if len(prompts) < len(calls):
            cache.batch_select_indices(rows)
            mask, logits = mask[rows], logits[rows]
            positions.select(rows)
        states.with_room(cache)
        texts = collate([Encoding(call.encoding.ids, {}, ()) for call in calls], pad)
        told = (texts[name].to(mask.device) for name in ("input_ids", "attention_mask"))
        requests, limits = [call.request for call in calls], [call.limit for call in calls]
        batch = _Batch(
            calls,
            [read.begun[owner] for owner in owners],
            [read.places[owner] for owner in owners],
            cache,
            mask,
            positions,
            RowSampler(requests, limits, *told),
            RowStopper(requests, limits, self._tokenizer, self._ends, mask.device),
            rows,
        )
        batch.draw(logits)
        return batch

    def _step(self, batch: _Batch[Asked], padded: bool) -> None:
        """Reads the rows' last tokens and draws the next ones."""
        new = batch.mask.new_ones(len(batch.mask), 1)
        batch.mask = torch.cat([batch.mask, new], dim=1)
        output = self._model(
            input_ids=batch.token[:, None],
            attention_mask=batch.mask if padded else None,
            position_ids=batch.positions.following(new),
            past_key_values=batch.cache,
            use_cache=True,
            **self._options,
        )
        batch.draw(output.logits[:, -1])

    def _reply(self, batch: _Batch[Asked], row: int) -> tuple[Asked, list[int]]:
        """A row that is done, remembered: its next turn goes on from it."""
        call, reply = batch.calls[row], batch.stopper.reply(row)
        self.prefixes.add(
            call.request.pictures,
            call.encoding.ids + reply[:-1],  # the last token was never read
            batch.places[row] + len(reply) - 1,
            batch.cache,
            row,
            batch.mask[row].nonzero()[:, 0],
            batch.begun[row],
        )
        return call, reply


def _keeps_logits(model: Any) -> bool:
    """Whether a model can be told to make logits for the last position only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
