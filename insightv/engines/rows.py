"""What each row of a batch has of its own: sampling, seed, stop strings and limit.

Rows leave a batch and others join it, each at its own place in its own reply. So whatever is kept
is a line of a tensor for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from insightv.engines.base import Request

_TOP = 32
"""Tokens sorted at first; a nucleus rarely reaches further."""


class _Rows:
    """Tensors with a line for each row, by their names."""

    _lines: tuple[str, ...] = ()

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with these rows only."""
        for name in self._lines:
            setattr(self, name, getattr(self, name)[rows])

    def replace(self, rows: torch.Tensor, more: Any) -> None:
        """Goes on with the rows of another one in the place of these."""
        self._heed(more)
        for name in self._lines:
            own, new = self._alike(name, more)
            own[rows] = new
            setattr(self, name, own)

    def join(self, more: Any) -> None:
        """Goes on with the rows of another one, too, behind its own."""
        self._heed(more)
        for name in self._lines:
            setattr(self, name, torch.cat(self._alike(name, more)))

    def _heed(self, more: Any) -> None:
        """Learns what holds for rows of another one alone."""

    def _alike(self, name: str, more: Any) -> list[torch.Tensor]:
        """Its lines and those of another one, of one width."""
        pair = [getattr(each, name) for each in (self, more)]
        width = max(held.shape[1] for held in pair)
        return [
            held if held.shape[1] == width else functional.pad(held, (0, width - held.shape[1]))
            for held in pair
        ]


class RowSampler(_Rows):
    """Draws each row's token at its own temperature, nucleus and seed.

    A token is found by inverting the cumulative distribution at a uniform number. The numbers
    of a whole call come from its seed before decoding starts, so that a row's draws depend
    neither on its neighbours nor on a Python loop over rows. Temperature 0 is greedy.
    """

    _lines = ("_hot", "_temperature", "_top_p", "_penalty", "_uniform", "_step", "_present")

    def __init__(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        prompts: torch.Tensor,
        mask: torch.Tensor,
    ):
        """Takes the rows' requests, their token limits, and their prompts with masks."""
        sampling = [request.sampling for request in requests]

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=mask.device)[:, None]

        self._hot = column([s.temperature for s in sampling]) > 0
        self._temperature = column([s.temperature or 1.0 for s in sampling])
        self._top_p = column([s.top_p for s in sampling])
        self._penalty = column([s.repetition_penalty for s in sampling])
        uniform = torch.zeros(len(requests), max(limits))
        for line, request, limit in zip(uniform, requests, limits, strict=True):
            draw = torch.Generator().manual_seed(request.seed)
            line[:limit] = torch.rand(limit, generator=draw)
        self._uniform = uniform.to(mask.device)
        self._sampled = any(s.temperature > 0 for s in sampling)
        self._penalised = any(s.repetition_penalty != 1 for s in sampling)
        self._step = torch.zeros(len(requests), 1, dtype=torch.long, device=mask.device)
        self._present = mask.new_zeros(len(requests), 0, dtype=torch.bool)
        self._prompts: tuple[torch.Tensor, torch.Tensor] | None = (prompts, mask.bool())

    def _heed(self, more: RowSampler) -> None:
        """Both have drawn a token already."""
        self._sampled |= more._sampled
        self._penalised |= more._penalised

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row, shape (rows,), from its logits (rows, vocabulary)."""
        if self._penalised:
            if self._prompts is not None:
                self._present = _tokens_present(*self._prompts, logits)
            weaker = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
            logits = torch.where(self._present, weaker, logits)
        token = logits.argmax(-1, keepdim=True)
        if self._sampled:
            token = torch.where(self._hot, self._draw(logits), token)
        if self._penalised:
            self._present.scatter_(1, token, True)
        self._prompts = None
        self._step += 1
        return token[:, 0]

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """One token a row, shape (rows, 1), from the nucleus at the row's temperature."""
        p = (logits / self._temperature).softmax(-1)
        tokens, enough = self._invert(p, min(_TOP, p.shape[1]))
        if not enough.logical_or(~self._hot).all():
            tokens, _ = self._invert(p, p.shape[1])
        return tokens

    def _invert(self, p: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverts the cumulative distribution over the ``most`` likeliest tokens.

        Returns:
            The tokens, and in which rows the drawn token is surely among those.
        """
        top, tokens = p.topk(most, dim=-1)
        cumulative = top.cumsum(-1)
        whole = self._top_p >= 1
        inside = (cumulative - top < self._top_p) | whole
        mass = torch.where(whole, p.sum(-1, keepdim=True), (top * inside).sum(-1, keepdim=True))
        # Rows that are done are drawn for, too, until they leave.
        step = self._step.clamp(max=self._uniform.shape[1] - 1)
        target = self._uniform.gather(1, step) * mass
        reached = cumulative[:, -1:]
        enough = torch.where(whole, target < reached, reached >= self._top_p)
        last = inside.sum(-1, keepdim=True) - 1
        place = (cumulative <= target).sum(-1, keepdim=True).minimum(last)
        return tokens.gather(1, place), enough


def _tokens_present(
    prompts: torch.Tensor, mask: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Which tokens the rows' prompts hold; padding is not part of a prompt."""
    counts, last = torch.zeros_like(logits), logits.shape[1] - 1
    inside = mask & (prompts <= last)  # a placeholder may have no logit
    counts.scatter_add_(1, prompts.clamp(max=last), inside.to(counts.dtype))
    return counts > 0


class RowStopper(_Rows):
    """Ends each row at its own stop strings, token limit or end of turn; keeps its tokens."""

    _lines = ("_limits", "_written", "_lengths", "_tokens")

    def __init__(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        tokenizer: Any,
        ends: Sequence[int],
        device: torch.device,
    ):
        """Takes the rows' requests, their token limits and the tokens that end a turn."""
        self._tokenizer = tokenizer
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self._limits = torch.tensor(list(limits), device=device)[:, None]
        self._written = torch.zeros_like(self._limits)
        self._lengths = torch.zeros_like(self._limits)  # 0: the row goes on
        # One place more: for what rows write that are done, until they leave.
        shape = len(requests), max(limits) + 1
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self._look_for([tuple(stop for stop in request.stop if stop) for request in requests])

    def _look_for(self, stops: list[tuple[str, ...]]) -> None:
        """Takes the rows' stop strings."""
        self._stops = stops
        every = frozenset(stop for row in stops for stop in row)
        self._closing = None
        if every:
            closing = _closing_tokens(self._tokenizer, frozenset(stop[-1] for stop in every))
            self._closing = closing.to(self._limits.device)
        # A stop string of n bytes spans at most n tokens.
        self._tail = max((len(stop.encode()) for stop in every), default=0)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with these rows only."""
        super().select(rows)
        self._stops = [self._stops[row] for row in rows.tolist()]

    def replace(self, rows: torch.Tensor, more: RowStopper) -> None:
        """Goes on with the rows of another one in the place of these."""
        super().replace(rows, more)
        for row, stops in zip(rows.tolist(), more._stops, strict=True):
            self._stops[row] = stops
        self._look_for(self._stops)

    def join(self, more: RowStopper) -> None:
        """Goes on with the rows of another one, too."""
        super().join(more)
        self._look_for(self._stops + more._stops)

    def __call__(self, token: torch.Tensor) -> None:
        """Takes the rows' next tokens, shape (rows,)."""
        self._tokens.scatter_(1, self._written.clamp(max=self._tokens.shape[1] - 1), token[:, None])
        self._written += 1
        going = self._lengths[:, 0] == 0
        done = torch.isin(token, self._ends) | (self._written >= self._limits)[:, 0]
        if self._closing is not None:
            suspects = self._closing[token] & ~done & going
            for row in suspects.nonzero()[:, 0].tolist():
                end = int(self._written[row])
                text = decode(self._tokenizer, self._tokens[row, max(0, end - self._tail) : end])
                done[row] = any(stop in text for stop in self._stops[row])
        self._lengths = torch.where((done & going)[:, None], self._written, self._lengths)

    def ended(self) -> torch.Tensor:
        """Which rows are done, shape (rows,)."""
        return self._lengths[:, 0] > 0

    def reply(self, row: int) -> list[int]:
        """The tokens of a row that is done, up to its end."""
        tokens: list[int] = self._tokens[row, : int(self._lengths[row])].tolist()
        return tokens


def decode(tokenizer: Any, ids: Any) -> str:
    """The text of tokens, control tokens left out, spaces as they are."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=16)
def _closing_tokens(tokenizer: Any, characters: frozenset[str]) -> torch.Tensor:
    """For each token, whether a stop string that ends in one of these characters may end in it.

    A quick look at ids, so that only a suspected row's tail is decoded in a step.
    """
    tokens = [[token] for token in range(len(tokenizer))]
    texts = tokenizer.batch_decode(tokens, clean_up_tokenization_spaces=False)
    # Parts of a character decode to the replacement character; some decoders drop a space.
    unsure = any(not character.isascii() or character == " " for character in characters)
    closing = [
        any(character in text for character in characters)
        or (unsure and ("\ufffd" in text or not text.strip()))
        for text in texts
    ]
    return torch.tensor(closing)
