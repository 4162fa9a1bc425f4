"""Requests as a server takes them: lengths, prompts and pictures, by the model's own folder."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hpc.errors import RecordError
from insightv import chats, models
from insightv.engines.base import Request
from insightv.engines.caching import Cache
from insightv.pictures import FORMATS, Pictures, turned

_PLAIN_MODES = ("RGB", "L")
_KINDS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass(frozen=True)
class Shown:
    """A picture as it is sent: a data URL, and how many tokens it is to the model."""

    url: str
    tokens: int


class Chats:
    """What a model's folder tells about requests, without its weights."""

    def __init__(self, model_folder: Path, pictures: Pictures, cache_bytes: int):
        """Loads the tokenizer and, if there is one, the picture processor.

        Raises:
            UserError: The folder has none.
        """
        self._processor = models.load_renderer(model_folder)
        self._pictures = pictures
        self._cache = Cache(self._show, lambda shown: len(shown.url), cache_bytes)

    def shown(self, request: Request) -> list[Shown]:
        """A request's pictures.

        Raises:
            RecordError: One is missing, damaged or refused, or the model takes none.
        """
        if request.pictures and not hasattr(self._processor, "image_token"):
            raise RecordError("the model takes no pictures")
        return [self._cache.get(name) for name in request.pictures]

    def texts(self, request: Request) -> list[str]:
        """The turns' texts, in which no control token can be read."""
        return [chats.plain(self._processor, message.text) for message in request.messages]

    def prompt(self, request: Request) -> str:
        """The whole prompt, a placeholder for each picture.

        Raises:
            RecordError: The model's template refuses the chat.
        """
        return chats.prompt(self._processor, request.messages, len(request.pictures))

    def count(self, request: Request) -> int:
        """The prompt's length in tokens, pictures included.

        Raises:
            RecordError: A picture or the chat is refused.
        """
        shown = self.shown(request)
        return self.length(self.prompt(request), shown)

    def length(self, prompt: str, shown: list[Shown]) -> int:
        """The same, of a prompt with its pictures."""
        ids = chats.tokens(self._processor, prompt)
        return len(ids) - len(shown) + sum(picture.tokens for picture in shown)

    def _show(self, name: str) -> Shown:
        """Encodes a picture once, in the cheapest form that shows a server what we see."""
        data, image = self._pictures.bytes(name), self._pictures.image(name)
        kind = _KINDS.get(_as_it_is(data), "")
        if not kind:
            packed = io.BytesIO()
            image.save(packed, "PNG", compress_level=1)
            kind, data = _KINDS["PNG"], packed.getvalue()
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        return Shown(url, chats.picture_tokens(self._processor, image))


def _as_it_is(data: bytes) -> str:
    """The format of a picture that every server decodes to the same pixels; else nothing.

    Servers differ in what they do about transparency, palettes, other colour spaces, several
    frames, and a camera that was held upright.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    plain = image.mode in _PLAIN_MODES and getattr(image, "n_frames", 1) == 1
    plain = plain and "transparency" not in image.info
    return str(image.format) if plain and not turned(image) else ""
