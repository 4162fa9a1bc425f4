"""Decoding a batch in which every row has its own sampling, seed, stop strings and limit.

One loop over the model's ``forward`` instead of ``generate``, for two reasons. The paths of a
question start alike, and go on from what they wrote: that is read once, and its keys and values
are then shared out (``prefixes``); and rows that are done leave the batch, where ``generate``
carries them to the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from insightv.chats import Encoding, collate
from insightv.engines.base import Request
from insightv.engines.prefill import Positions, read_prompts
from insightv.engines.prefixes import Prefixes, give_room

_TOP = 32
"""Tokens sorted at first; a nucleus rarely reaches further."""
_KEEP = 0.75
"""The batch is packed anew when no more than this share of its rows goes on."""


@torch.inference_mode()
def decode_rows(
    model: Any,
    prompts: Sequence[Encoding],
    owners: Sequence[int],
    requests: Sequence[Request],
    limits: Sequence[int],
    tokenizer: Any,
    ends: Sequence[int],
    prefixes: Prefixes,
) -> list[list[int]]:
    """Decodes one batch.

    Args:
        model: Any picture-and-text decoder of transformers.
        prompts: The different prompts.
        owners: For each row, which of the prompts it goes on from.
        requests: The rows' requests.
        limits: The rows' token limits.
        tokenizer: The model's.
        ends: Tokens that end a turn.
        prefixes: What the model remembers of earlier batches, and will of this one.

    Returns:
        Each row's new tokens, the ending one included.
    """
    options: dict[str, Any] = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    positions = Positions(model)
    pad = tokenizer.pad_token_id
    shown = dict(zip(owners, (request.pictures for request in requests), strict=True))
    pictures = [shown[number] for number in range(len(prompts))]
    read = read_prompts(model, prompts, pictures, pad, positions, options, prefixes)
    mask, logits, cache = read.mask, read.logits, read.cache
    padded = not bool(mask.all())
    if list(owners) != list(range(len(mask))):
        rows = torch.tensor(owners, device=mask.device)
        logits, mask = logits[rows], mask[rows]
        positions.select(rows)
        cache.batch_select_indices(rows)
    give_room(cache)
    texts = collate([Encoding(prompts[number].ids, {}, ()) for number in owners], pad)
    asked = (texts[name].to(mask.device) for name in ("input_ids", "attention_mask"))
    sampler = RowSampler(requests, limits, *asked)
    stopper = RowStopper(requests, limits, tokenizer, ends, mask.device)
    while True:
        token = sampler(logits.float())
        going = ~stopper(token)
        count = int(going.sum())
        if count <= _KEEP * len(going):
            for place in (~going).nonzero()[:, 0].tolist():
                row, reply = stopper.reply(place)
                number = owners[row]
                ids = prompts[number].ids + reply[:-1]  # the last token was never read
                prefixes.add(
                    pictures[number],
                    ids,
                    read.places[number] + len(reply) - 1,
                    cache,
                    place,
                    mask[place].nonzero()[:, 0],
                    read.begun[number],
                )
            if not count:
                return stopper.tokens()
            kept = going.nonzero()[:, 0]
            token, mask = token[kept], mask[kept]
            sampler.select(kept)
            stopper.select(kept)
            positions.select(kept)
            cache.batch_select_indices(kept)
        new = mask.new_ones(len(mask), 1)
        mask = torch.cat([mask, new], dim=1)
        logits = model(
            input_ids=token[:, None],
            attention_mask=mask if padded else None,
            position_ids=positions.following(new),
            past_key_values=cache,
            use_cache=True,
            **options,
        ).logits[:, -1]


class RowSampler:
    """Draws each row's token at its own temperature, nucleus and seed.

    A token is found by inverting the cumulative distribution at a uniform number. The numbers
    of a whole call come from its seed before decoding starts, so that a row's draws depend
    neither on its neighbours nor on a Python loop over rows. Temperature 0 is greedy.
    """

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
        self._prompts, self._mask = prompts, mask.bool()
        self._present: torch.Tensor | None = None
        self._step = 0

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with these rows only."""
        for name in ("_hot", "_temperature", "_top_p", "_penalty", "_uniform", "_present"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[rows])

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row, shape (rows,), from its logits (rows, vocabulary)."""
        if self._penalised:
            present = self._tokens_present(logits)
            weaker = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
            logits = torch.where(present, weaker, logits)
        token = logits.argmax(-1, keepdim=True)
        if self._sampled:
            token = torch.where(self._hot, self._draw(logits), token)
        if self._present is not None:
            self._present.scatter_(1, token, True)
        self._step += 1
        return token[:, 0]

    def _tokens_present(self, logits: torch.Tensor) -> torch.Tensor:
        """Which tokens a row's prompt or reply holds; padding is not part of a prompt."""
        if self._present is None:
            counts, last = torch.zeros_like(logits), logits.shape[1] - 1
            inside = self._mask & (self._prompts <= last)  # a placeholder may have no logit
            counts.scatter_add_(1, self._prompts.clamp(max=last), inside.to(counts.dtype))
            self._present = counts > 0
        return self._present

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
        target = self._uniform[:, self._step, None] * mass
        reached = cumulative[:, -1:]
        enough = torch.where(whole, target < reached, reached >= self._top_p)
        last = inside.sum(-1, keepdim=True) - 1
        place = (cumulative <= target).sum(-1, keepdim=True).minimum(last)
        return tokens.gather(1, place), enough


class RowStopper:
    """Ends each row at its own stop strings, token limit or end of turn; keeps its tokens."""

    def __init__(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        tokenizer: Any,
        ends: Sequence[int],
        device: torch.device,
    ):
        """Takes the rows' requests, their token limits and the tokens that end a turn."""
        self._stops = [tuple(stop for stop in request.stop if stop) for request in requests]
        self._tokenizer = tokenizer
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self._limits = torch.tensor(list(limits), device=device)
        self._rows = torch.arange(len(requests), device=device)
        self._done = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self._lengths = self._limits.clone()
        self._tokens = torch.zeros(len(requests), max(limits), dtype=torch.long, device=device)
        self._step = 0
        stops = {stop for row in self._stops for stop in row}
        self._closing = None
        if stops:
            closing = _closing_tokens(tokenizer, frozenset(stop[-1] for stop in stops))
            self._closing = torch.tensor(closing, device=device)
        # A stop string of n bytes spans at most n tokens.
        self._tail = max((len(stop.encode()) for stop in stops), default=0)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with these of the rows it goes on with."""
        self._rows = self._rows[rows]

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Takes the rows' next tokens, shape (rows,); returns which of the rows are done."""
        rows = self._rows
        self._tokens[rows, self._step] = token
        self._step += 1
        done = torch.isin(token, self._ends) | (self._step >= self._limits[rows])
        if self._closing is not None:
            suspects = self._closing[token] & ~done & ~self._done[rows]
            for place in suspects.nonzero()[:, 0].tolist():
                row = int(rows[place])
                tail = self._tokens[row, max(0, self._step - self._tail) : self._step]
                text = decode(self._tokenizer, tail)
                done[place] = any(stop in text for stop in self._stops[row])
        new = rows[done & ~self._done[rows]]
        self._lengths[new] = self._step
        self._done[new] = True
        return self._done[rows]

    def reply(self, place: int) -> tuple[int, list[int]]:
        """Which row stands at a place of the batch, and its tokens up to its end."""
        row = int(self._rows[place])
        return row, self._tokens[row, : int(self._lengths[row])].tolist()

    def tokens(self) -> list[list[int]]:
        """Each row's tokens up to its end, all rows in their first order."""
        pairs = zip(self._tokens.tolist(), self._lengths.tolist(), strict=True)
        return [row[:length] for row, length in pairs]


def decode(tokenizer: Any, ids: Any) -> str:
    """The text of tokens, control tokens left out, spaces as they are."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=16)
def _closing_tokens(tokenizer: Any, characters: frozenset[str]) -> list[bool]:
    """For each token, whether a stop string that ends in one of these characters may end in it.

    A quick look at ids, so that only a suspected row's tail is decoded in a step.
    """
    tokens = [[token] for token in range(len(tokenizer))]
    texts = tokenizer.batch_decode(tokens, clean_up_tokenization_spaces=False)
    # Parts of a character decode to the replacement character; some decoders drop a space.
    unsure = any(not character.isascii() or character == " " for character in characters)
    return [
        any(character in text for character in characters)
        or (unsure and ("\ufffd" in text or not text.strip()))
        for text in texts
    ]


def _keeps_logits(model: Any) -> bool:
    """Whether a model can be told to make logits for the last position only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
