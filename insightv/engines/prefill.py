"""Reading a batch's prompts: what several of them begin with is read once.

The paths of a question show one picture and ask one thing; step by step, their prompts differ
only behind that. Such prompts have a head in common, which goes through the model once, its
picture with it. Then what is left of each prompt goes through behind the head's keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insightv import chats
from insightv.chats import Encoding
from insightv.engines.prefixes import Begun, Pictures, Prefixes, resumed

_ALIKE = 0.5
"""Prompts have a head together if it is this share of the shorter one, or more."""
_WORTH = 0.85
"""Reading in two passes must spare so much: no more than this share of all tokens is left."""


class Positions:
    """Where the rows' next tokens stand, in one dimension or (M-RoPE) in three.

    A model with M-RoPE places pictures in a plane; it computes the positions of a prompt
    itself and leaves in ``rope_deltas`` how far each row's next text is off its place in
    the line. It leaves nothing for prompts without pictures, which it counts with padding.
    """

    def __init__(self, model: Any):
        """Looks at the model's kind; what an earlier batch left is forgotten."""
        shells = [model, getattr(model, "model", None)]
        self._owner = next((shell for shell in shells if hasattr(shell, "rope_deltas")), None)
        if self._owner is not None:
            self._owner.rope_deltas = None  # of an earlier batch

    def of_prompts(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The positions of the prompts, where the model does not find them itself."""
        if self._owner is not None:
            return {}
        return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def start(self, mask: torch.Tensor) -> None:
        """Takes up after prompts, or their heads, have been read."""
        self._next = mask.sum(-1, keepdim=True)
        if self._owner is not None:
            deltas = self._owner.rope_deltas
            whole = torch.full_like(self._next, mask.shape[1])
            self._next = whole if deltas is None else self._next + deltas
            self._owner.rope_deltas = None

    def places(self) -> list[int]:
        """Where each row's next token stands."""
        places: list[int] = self._next[:, 0].tolist()
        return places

    def resume(self, places: Sequence[int], device: torch.device) -> None:
        """Takes up where these rows were left."""
        self._next = torch.tensor(places, device=device)[:, None]

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with these rows only."""
        self._next = self._next[rows]

    def replace(self, rows: torch.Tensor, more: Positions) -> None:
        """Goes on with the rows of another one in the place of these."""
        self._next[rows] = more._next

    def join(self, more: Positions) -> None:
        """Goes on with the rows of another one, too."""
        self._next = torch.cat([self._next, more._next])

    def following(self, mask: torch.Tensor) -> torch.Tensor:
        """Positions of the next tokens, those under ``mask``.

        Args:
            mask: Shape (rows, tokens); 0 where a row is padded on the left.

        Returns:
            Shape (rows, tokens), or (3, rows, tokens) with M-RoPE.
        """
        positions = self._next + (mask.cumsum(-1) - 1).clamp(min=0)
        self._next = self._next + mask.sum(-1, keepdim=True)
        return positions if self._owner is None else positions.expand(3, -1, -1)


@dataclass(frozen=True)
class ReadPrompts:
    """Prompts that the model has read.

    Attributes:
        mask: 0 where there is padding, on the left or behind a head.
        logits: Of each prompt's next token, shape (prompts, vocabulary).
        cache: Keys and values.
        places: Positions of the next tokens.
        begun: What is remembered of each prompt.
    """

    mask: torch.Tensor
    logits: torch.Tensor
    cache: Any
    places: list[int]
    begun: list[Begun | None]


def read_prompts(
    model: Any,
    prompts: Sequence[Encoding],
    pictures: Sequence[Pictures],
    pad_token: int,
    positions: Positions,
    options: dict[str, Any],
    prefixes: Prefixes,
) -> ReadPrompts:
    """Reads the different prompts of a batch, known and common heads once where that spares enough.

    Args:
        model: Any picture-and-text decoder of transformers.
        prompts: The different prompts.
        pictures: The names of what they show.
        pad_token: Stands where a row is shorter than others.
        positions: Taken to behind the prompts.
        options: More for ``forward``.
        prefixes: What the model remembers; these prompts are among it then.
    """

    def whole(some: Sequence[Encoding], shown: Sequence[Pictures]) -> ReadPrompts:
        inputs = _placed(model, chats.collate(some, pad_token))
        mask = inputs["attention_mask"]
        output = model(**inputs, **options, **positions.of_prompts(mask), use_cache=True)
        positions.start(mask)
        places, cache = positions.places(), output.past_key_values
        begun: list[Begun | None] = []
        for row, (prompt, place) in enumerate(zip(some, places, strict=True)):
            columns = mask[row].nonzero()[:, 0]
            begun.append(prefixes.add(shown[row], prompt.ids, place, cache, row, columns))
        return ReadPrompts(mask, output.logits[:, -1], cache, places, begun)

    if not prefixes.possible:
        return whole(prompts, pictures)
    begun = [
        prefixes.find(names, prompt.ids, prompt.opening)
        for names, prompt in zip(pictures, prompts, strict=True)
    ]
    new = [number for number, found in enumerate(begun) if found is None]
    heads, owners = _heads([prompts[number] for number in new])
    lengths = [0 if found is None else found[1] for found in begun]
    for number, owner in zip(new, owners, strict=True):
        lengths[number] = len(heads[owner].ids)
    tails = [
        Encoding(prompt.ids[length:], {}, ())
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    if _area(heads) + _area(tails) > _WORTH * _area(prompts):
        return whole(prompts, pictures)
    if heads:
        shown = {owner: pictures[number] for number, owner in zip(new, owners, strict=True)}
        first = whole(heads, [shown[owner] for owner in range(len(heads))])
        for number, owner in zip(new, owners, strict=True):
            begun[number] = first.begun[owner]
    known = [found for found in begun if found is not None]
    more = _placed(model, chats.collate(tails, pad_token))
    cache, mask = resumed(known, more["input_ids"].shape[1])
    positions.resume([span.place_at(length) for span, length in known], mask.device)
    mask = torch.cat([mask, more["attention_mask"]], dim=1)
    output = model(
        input_ids=more["input_ids"],
        attention_mask=mask,
        position_ids=positions.following(more["attention_mask"]),
        past_key_values=cache,
        use_cache=True,
        **options,
    )
    return ReadPrompts(mask, output.logits[:, -1], cache, positions.places(), begun)


def _heads(prompts: Sequence[Encoding]) -> tuple[list[Encoding], list[int]]:
    """What prompts begin with, all pictures included, and for each prompt which head is its own.

    Prompts that begin alike stand side by side when they are sorted. A head leaves at least
    one token of each of its prompts.
    """
    order = sorted(range(len(prompts)), key=lambda n: (_shown(prompts[n]), prompts[n].ids))
    lengths: list[int] = []
    members: list[list[int]] = []
    for number in order:
        prompt = prompts[number]
        if lengths:
            last = prompts[members[-1][0]]
            same = min(chats.common(last.ids, prompt.ids), len(prompt.ids) - 1, lengths[-1])
            alike = same >= _ALIKE * min(len(last.ids), len(prompt.ids))
            if alike and _shown(last) == _shown(prompt) and same >= prompt.opening:
                lengths[-1] = same
                members[-1].append(number)
                continue
        lengths.append(len(prompt.ids) - 1)
        members.append([number])
    owners = [0] * len(prompts)
    heads = []
    for place, (length, numbers) in enumerate(zip(lengths, members, strict=True)):
        whole = prompts[numbers[0]]
        marks = {name: values[:length] for name, values in whole.marks.items()}
        heads.append(Encoding(whole.ids[:length], marks, whole.pictures, whole.opening))
        for number in numbers:
            owners[number] = place
    return heads, owners


def _shown(prompt: Encoding) -> tuple[int, ...]:
    """Its pictures; the same ones are the same objects, as long as they are remembered."""
    return tuple(id(picture) for picture in prompt.pictures)


def _area(prompts: Sequence[Encoding]) -> int:
    """Tokens of a batch, padding included."""
    return len(prompts) * max((len(prompt.ids) for prompt in prompts), default=0)


def _placed(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs on the model's device, pixels in its type."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
