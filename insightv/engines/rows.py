"""Sampling and stopping for ``generate``, each row of a batch by its own request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from insightv.engines.base import Request

_TOP = 64
"""Tokens sorted at first; the nucleus rarely reaches further."""


class RowSampler(LogitsProcessor):
    """Draws each row's token at its own temperature, nucleus and seed.

    A token is drawn by inverting the cumulative distribution at a uniform number, and all
    other logits become -inf, so that ``generate`` runs greedily and any model family's own
    decoding stays as it is. The uniform numbers of a whole call come from its seed before
    decoding starts: no Python loop over rows in a step. Rows at temperature 0 stay greedy.
    """

    def __init__(
        self, requests: Sequence[Request], limits: Sequence[int], attention_mask: torch.Tensor
    ):
        """Takes the rows' requests, their token limits and the prompts' mask."""
        sampling = [request.sampling for request in requests]
        device = attention_mask.device

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device)[:, None]

        hot = [row for row, s in enumerate(sampling) if s.temperature > 0]
        self._hot = torch.tensor(hot, dtype=torch.long, device=device)
        self._temperature = column([sampling[row].temperature for row in hot])
        self._top_p = column([sampling[row].top_p for row in hot])
        uniform = torch.zeros(len(hot), max(limits))
        for line, row in zip(uniform, hot, strict=True):
            draw = torch.Generator().manual_seed(requests[row].seed)
            line[: limits[row]] = torch.rand(limits[row], generator=draw)
        self._uniform = uniform.to(device)
        self._penalty = column([s.repetition_penalty for s in sampling])
        self._penalised = any(s.repetition_penalty != 1 for s in sampling)
        self._present: torch.Tensor | None = None
        self._mask = attention_mask
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (rows, vocabulary) in, the same with all but the drawn tokens at -inf out."""
        if self._penalised:
            present = self._tokens_present(input_ids, scores)
            weaker = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
            scores = torch.where(present, weaker, scores)
        if len(self._hot):
            drawn = self._draw(scores[self._hot], self._uniform[:, self._step, None])
            scores[self._hot] = torch.full_like(scores[self._hot], -torch.inf).scatter(1, drawn, 0)
        self._step += 1
        return scores

    def _tokens_present(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Which tokens a row's prompt or reply already holds, kept up from step to step."""
        if self._present is None:  # padding is not part of a prompt
            counts, last = torch.zeros_like(scores), scores.shape[1] - 1
            inside = self._mask.bool() & (input_ids <= last)  # a placeholder may have no logit
            counts.scatter_add_(1, input_ids.clamp(max=last), inside.to(counts.dtype))
            self._present = counts > 0
        else:
            self._present.scatter_(1, input_ids[:, -1:], True)
        return self._present

    def _draw(self, scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """One token a row, shape (rows, 1), from the nucleus at the row's temperature."""
        p = (scores / self._temperature).softmax(-1)
        tokens, enough = self._invert(p, uniform, min(_TOP, p.shape[1]))
        if not enough.all():
            tokens, _ = self._invert(p, uniform, p.shape[1])
        return tokens

    def _invert(
        self, p: torch.Tensor, uniform: torch.Tensor, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverts the cumulative distribution over the ``most`` likeliest tokens.

        Returns:
            The tokens, and in which rows the drawn token is surely among them.
        """
        top, tokens = p.topk(most, dim=-1)
        cumulative = top.cumsum(-1)
        whole = self._top_p >= 1
        inside = (cumulative - top < self._top_p) | whole
        mass = torch.where(whole, p.sum(-1, keepdim=True), (top * inside).sum(-1, keepdim=True))
        target = uniform * mass
        reached = cumulative[:, -1:]
        enough = torch.where(whole, target < reached, reached >= self._top_p)
        last = inside.sum(-1, keepdim=True) - 1
        place = (cumulative <= target).sum(-1, keepdim=True).minimum(last)
        return tokens.gather(1, place), enough


class RowStopper(StoppingCriteria):
    """Ends each row at its own stop strings, token limit or end of turn.

    Attributes:
        lengths: Generated tokens of each row, the ending one included.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        prompt_length: int,
        tokenizer: Any,
        ends: Sequence[int],
        device: torch.device,
    ):
        """Takes the rows' requests, their limits, the padded prompt length, the end tokens."""
        self._requests = requests
        self._prompt = prompt_length
        self._tokenizer = tokenizer
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self._limits = torch.tensor(list(limits), device=device)
        self._done = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self.lengths = self._limits.clone()
        stops = {stop for request in requests for stop in request.stop if stop}
        self._closing = None
        if stops:
            closing = closing_tokens(tokenizer, frozenset(stop[-1] for stop in stops))
            self._closing = torch.tensor(closing, device=device)
        # A stop string of n bytes has at most n tokens; the token that ends it may go on.
        self._tail = max((len(stop.encode()) for stop in stops), default=0) + 1

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """Which rows are done, shape (rows,), given all tokens so far."""
        length = input_ids.shape[1] - self._prompt
        token = input_ids[:, -1]
        done = torch.isin(token, self._ends) | (length >= self._limits)
        if self._closing is not None:
            suspects = (self._closing[token] & ~done & ~self._done).nonzero()[:, 0].tolist()
            tails = input_ids[:, -min(self._tail, length) :]
            for row in suspects:
                text = decode(self._tokenizer, tails[row])
                if any(stop in text for stop in self._requests[row].stop if stop):
                    done[row] = True
        self.lengths = torch.where(done & ~self._done, length, self.lengths)
        self._done = self._done | done
        return self._done


def decode(tokenizer: Any, ids: Any) -> str:
    """The text of tokens, control tokens left out, spaces as they are."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=16)
def closing_tokens(tokenizer: Any, characters: frozenset[str]) -> list[bool]:
    """For each token whether a stop string that ends in one of these characters may end in it.

    A quick test on ids, so that only a suspected row's tail is decoded in a step.
    """
    count = len(tokenizer)
    texts = tokenizer.batch_decode(
        [[token] for token in range(count)], clean_up_tokenization_spaces=False
    )
    # Parts of a character decode to the replacement character; some decoders drop a space.
    unsure = any(not c.isascii() or c == " " for c in characters)
    return [
        any(c in text for c in characters) or (unsure and ("\ufffd" in text or not text.strip()))
        for text in texts
    ]
