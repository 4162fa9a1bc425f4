"""The one interface to a model that writes text: chats with pictures in, texts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from insightv.records import Message


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus: the smallest set of tokens with this probability mass.
        repetition_penalty: Divides (or multiplies) logits of tokens already present; 1 is off.
        max_tokens: Upper limit on generated tokens of one call.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024


@dataclass(frozen=True)
class Request:
    """One call.

    Attributes:
        messages: The chat. If the last turn is the assistant's, the model goes on writing
            that same turn (nothing is inserted in between).
        pictures: Picture ids, shown in the first user turn.
        sampling: How tokens are drawn.
        seed: Makes this call's draws its own; the same seed in the same batch composition
            gives the same text.
        stop: Strings that end the text; the text returned ends before the first of them.
    """

    messages: tuple[Message, ...]
    pictures: tuple[str, ...]
    sampling: Sampling
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What came back.

    Attributes:
        text: The generated text, without the prompt.
        tokens: How many tokens were generated.
        finish: ``stop`` (end of turn or a stop string) or ``length`` (the token limit).
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"]


class Engine(Protocol):
    """Something that completes chats, many at a time."""

    digest: str
    """Identifies the model's weights."""
    concurrency: int
    """How many calls to keep in flight so that its batch stays full."""
    context: int
    """Longest prompt plus reply in tokens."""

    async def complete(self, request: Request) -> Completion:
        """Completes one chat. Await many of them at once to fill the batch.

        Raises:
            RecordError: This request cannot be served (a broken picture, a context overflow).
        """
        ...

    def count(self, request: Request) -> int:
        """Length of the request's prompt in tokens, pictures included."""
        ...

    async def close(self) -> None:
        """Frees the model or shuts the server down."""
        ...
