"""Questions of the evaluation sets that training must not see, found by picture and text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from insightv.assessment.decision import normal

SIDE = 16
"""Looks are compared on this many pixels a side: enough to tell charts of one style apart."""
MEAN, MOST = 2.0, 24
"""Same looks: so far apart at most, of 255, on average and anywhere. Encoding a picture again,
or at another size, moves it by about half of that."""


@dataclass(frozen=True)
class Fingerprint:
    """What a picture is recognised by.

    Attributes:
        digest: SHA-256 of its file.
        looks: Its colours on 16 × 16 pixels, 768 bytes.
    """

    digest: str
    looks: bytes

    @classmethod
    def of(cls, image: Image.Image, digest: str) -> Fingerprint:
        """Of a decoded RGB picture."""
        small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
        return cls(digest, small.tobytes())

    def resembles(self, other: Fingerprint) -> bool:
        """Whether the two are one picture, in whatever encoding or size."""
        if self.digest == other.digest:
            return True
        one, two = (np.frombuffer(p.looks, np.uint8).astype(np.int16) for p in (self, other))
        apart = np.abs(one - two)
        return bool(apart.mean() <= MEAN and apart.max() <= MOST)


class HeldOut:
    """The questions of evaluation sets, by text and picture.

    Held in memory: some 1 kB a question.
    """

    def __init__(self) -> None:
        self._by_text: dict[str, list[tuple[str, tuple[Fingerprint, ...]]]] = defaultdict(list)
        self._pictures: dict[str | bytes, str] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_text.values()))

    def add(self, key: str, text: str, pictures: Sequence[Fingerprint]) -> None:
        """Holds a question out."""
        self._by_text[normal(text)].append((key, tuple(pictures)))
        for picture in pictures:
            self._pictures.setdefault(picture.digest, key)
            self._pictures.setdefault(picture.looks, key)

    def same_question(self, text: str, pictures: Sequence[Fingerprint]) -> str:
        """Key of a held-out question with the same text about the same pictures; or empty."""
        for key, others in self._by_text.get(normal(text), ()):
            if len(others) == len(pictures) and all(
                any(one.resembles(two) for two in others) for one in pictures
            ):
                return key
        return ""

    def same_picture(self, pictures: Sequence[Fingerprint]) -> str:
        """Key of a held-out question about one of these very pictures; or empty."""
        for picture in pictures:
            for mark in (picture.digest, picture.looks):
                if mark in self._pictures:
                    return self._pictures[mark]
        return ""
