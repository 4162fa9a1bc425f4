"""What a client asks, checked, and the pictures it sends."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from hpc.errors import RecordError
from insightv.engines.server.client import excerpt, whole
from insightv.pictures import Pictures, decode
from insightv.questions.texts import said_with_pictures

MOST_BYTES = 64 * 2**20
"""Of a request: some large pictures."""
MOST_PICTURES = 16
MOST_STOPS = 4
_DATA_URL = re.compile(r"data:image/[a-z.+-]+;base64,", re.I)
_REFUSED = (
    "tools",
    "functions",
    "response_format",
    "logprobs",
    "top_logprobs",
    "audio",
    "logit_bias",
    "frequency_penalty",
    "presence_penalty",
)
"""What a client would miss if it were passed over."""


class Refused(Exception):
    """A request that cannot be served as it is; with the status that says so."""

    def __init__(self, reason: str, status: int = 400):
        super().__init__(reason)
        self.status = status


class LentPictures(Pictures):
    """Pictures in memory while requests that show them are under way."""

    def __init__(self) -> None:
        """Holds none yet."""
        super().__init__([])
        self._held: dict[str, bytes] = {}
        self._users: Counter[str] = Counter()
        self._lock = Lock()

    def lend(self, data: bytes) -> str:
        """Takes an encoded picture, in any thread; returns its id.

        Raises:
            RecordError: It cannot be decoded.
        """
        name = hashlib.sha256(data).hexdigest()
        decode(data, name[:12])
        with self._lock:
            self._held[name] = data
            self._users[name] += 1
        return name

    def give_back(self, name: str) -> None:
        """Forgets a picture that no other request shows."""
        with self._lock:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._held[name]

    def bytes(self, picture: str) -> bytes:
        """The encoded picture.

        Raises:
            RecordError: It is not held.
        """
        if picture not in self._held:
            raise RecordError(f"picture {picture[:12]} is not there any more")
        return self._held[picture]


@dataclass(frozen=True)
class Asked:
    """A chat request, checked.

    Attributes:
        model: One of `MODELS`.
        text: The last user turn.
        pictures: All pictures of the user's turns, encoded.
        stream: Whether the reply comes in pieces.
        seed: Of the draws.
        temperature: None: as the run was evaluated.
        top_p: Likewise.
        tokens: Most tokens of the answer; 0: as the run was evaluated.
        stop: Strings that end the answer.
        usage: Whether a stream ends with the tokens it took.
    """

    model: str
    text: str
    pictures: tuple[bytes, ...]
    stream: bool
    seed: int
    temperature: float | None = None
    top_p: float | None = None
    tokens: int = 0
    stop: tuple[str, ...] = ()
    usage: bool = False


def parse(body: Any, offered: tuple[str, ...]) -> Asked:
    """Checks a chat request.

    Raises:
        Refused: It is none, or asks for what is not to be had.
    """
    if not isinstance(body, dict):
        raise Refused("the body is no JSON object")
    model = body.get("model")
    if model not in offered:
        raise Refused(f"no model '{excerpt(str(model), 60)}': use {', '.join(offered)}")
    for name in _REFUSED:
        if body.get(name) and body[name] != {"type": "text"}:
            raise Refused(f"{name} is not to be had here")
    if _number(body, "n", 1) != 1:
        raise Refused("n is 1 here: ask again with another seed")
    texts: list[str] = []
    pictures: list[bytes] = []
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages: give a list of turns")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in (
            "system",
            "developer",
            "user",
            "assistant",
        ):
            raise Refused("messages: each turn has a role (system, user or assistant) and content")
        if message["role"] == "user":
            text, shown = _content(message.get("content"), len(pictures))
            texts.append(text)
            pictures += shown
    if messages[-1]["role"] != "user" or not texts[-1].strip():
        raise Refused("messages: the last turn must be the user's, and ask something")
    if len(pictures) > MOST_PICTURES:
        raise Refused(f"{len(pictures)} pictures: {MOST_PICTURES} at most")
    warm, top = body.get("temperature"), body.get("top_p")
    streamed = body.get("stream_options")
    name = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    return Asked(
        model=model,
        text=whole(texts[-1]),
        pictures=tuple(pictures),
        stream=bool(body.get("stream")),
        seed=int(_number(body, "seed", 0, -(2.0**63), 2.0**63)),
        temperature=None if warm is None else _number(body, "temperature", 0, 0, 100),
        top_p=None if top is None else _number(body, "top_p", 1, 1e-6, 1),
        tokens=int(_number(body, name, 0, 1, 1_000_000)),
        stop=_stops(body.get("stop")),
        usage=isinstance(streamed, dict) and bool(streamed.get("include_usage")),
    )


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given or []
    fine = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    if not fine or len(stops) > MOST_STOPS:
        raise Refused(f"stop is a text or a list of up to {MOST_STOPS}")
    return tuple(stops)


def _content(content: Any, before: int) -> tuple[str, list[bytes]]:
    """A turn's text and pictures; ``before`` are those of earlier turns."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise Refused("messages: content is a text or a list of parts")
    texts: list[str | None] = []
    pictures = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            pictures.append(_picture(part.get("image_url")))
            texts.append(None)
        else:
            raise Refused("messages: a part is of type text or image_url")
    return said_with_pictures(texts, before), pictures


def _picture(given: Any) -> bytes:
    """The bytes of a data URL; nothing is fetched from anywhere."""
    url = given.get("url") if isinstance(given, dict) else given
    found = _DATA_URL.match(url) if isinstance(url, str) else None
    if found is None:
        raise Refused("image_url: give the picture itself, as data:image/png;base64,…")
    try:
        return base64.b64decode(found.string[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise Refused("image_url: that is no base64") from None


def _number(
    body: Mapping[str, Any], name: str, usual: float, low: float = 1, high: float = 1e9
) -> float:
    value = body.get(name)
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(f"{name} must be a number from {low:g} to {high:g}")
    return value
