"""The pictures and questions of the easy-vqa package (MIT licence): coloured shapes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image

from hpc.errors import UserError
from insightv.demo.charts import SIZE
from insightv.demo.tables import INSTALL

COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
FORMS = ("circle", "rectangle", "triangle")


def easy_vqa_rows(split: Literal["train", "test"]) -> list[tuple[str, str, Path]]:
    """(question, answer, picture file) of the package's own split, in its order.

    Raises:
        UserError: The package is not installed.
    """
    try:
        import easy_vqa
    except ImportError:
        raise UserError(f"the coloured shapes need the package easy-vqa: {INSTALL}") from None
    if split == "train":
        texts, answers, ids = easy_vqa.get_train_questions()
        paths = easy_vqa.get_train_image_paths()
    else:
        texts, answers, ids = easy_vqa.get_test_questions()
        paths = easy_vqa.get_test_image_paths()
    return [
        (text, answer, Path(paths[k])) for text, answer, k in zip(texts, answers, ids, strict=True)
    ]


def picture_split(path: Path) -> Literal["train", "validation", "test"]:
    """The split of a picture file: the package's own, a tenth of whose training is held out."""
    if path.parent.parent.name == "test":
        return "test"
    return "validation" if hashlib.sha256(path.name.encode()).digest()[0] < 26 else "train"


def seen(pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Colour and shape of a picture, as far as its questions and answers tell.

    Returns:
        The colour (``""``: not told) and the shape (``"shape"``: not told).
    """
    colour, shape = "", "shape"
    for question, answer in pairs:
        words = question.rstrip("?").split()
        there = answer == ("no" if "not" in words or "no" in words else "yes")
        if answer in COLOURS:
            colour = answer
        if answer in FORMS:
            shape = answer
        for word in words if there or words[0] == "what" else ():
            colour = word if word in COLOURS else colour
            shape = word if word in FORMS else shape
    return colour, shape


@lru_cache
def training_pictures() -> list[tuple[Image.Image, list[tuple[str, str]]]]:
    """Training pictures at the model's size, each with its (question, answer) pairs."""
    pairs: dict[Path, list[tuple[str, str]]] = defaultdict(list)
    for text, answer, path in easy_vqa_rows("train"):
        if picture_split(path) == "train":
            pairs[path].append((text, answer))
    pictures = []
    for path, asked in pairs.items():
        with Image.open(path) as image:
            pictures.append(
                (image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC), asked)
            )
    return pictures
