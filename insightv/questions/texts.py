"""Texts of rows as questions need them: answers, options, placeholders of pictures."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpc.errors import RecordError
from insightv.assessment.decision import normal

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What options are called."""
_PLACEHOLDER = re.compile(r"<image[ _]?(\d*)>")
_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]+(\S.*?)[ \t]*$", re.M)
_NUMBER = re.compile(r"[-−+]?[$€£]?\s?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?\s?%?|[-−+]?\.\d+")
_FORMULA = re.compile(r"\$?[-\d\s+*/^(){}.]*\\(?:d?frac|sqrt|pi|times|cdot)\b.*")


def as_text(value: Any) -> str:
    """A value as text that can be stored; whole floats without a point, nothing for null or NaN.

    Raises:
        RecordError: It holds several values.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, (list, tuple, dict)):
        held = "keys" if isinstance(value, dict) else "a list"
        raise RecordError(f"row: {held} where one text is wanted; column.key names a key inside")
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, float) and np.float32(value) == value:
        return str(np.float32(value))  # stored as one: 0.1, not 0.10000000149011612
    return str(value).encode("utf-8", "replace").decode()  # JSON may hold half a character


def as_options(value: Any) -> tuple[str, ...]:
    """Options as texts, from a list or from one that is written out.

    Raises:
        RecordError: Neither.
    """
    if isinstance(value, str) and value.strip():
        value = _written(value)
    if value is None or value == "":
        return ()
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        raise RecordError("options: not a list")
    options = [as_text(option).strip() for option in value]
    while options and not options[-1]:  # columns for four of them, of which two are used
        options.pop()
    return tuple(options)


def _written(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def options_of(text: str) -> tuple[str, tuple[str, ...]]:
    """The lines ``A. …``, ``B. …`` at the end of a question, taken off it."""
    found = list(_OPTION.finditer(text))
    while found and found[0][1] != "A":
        found.pop(0)
    if len(found) < 2 or [match[1] for match in found] != list(LETTERS[: len(found)]):
        return text, ()
    return text[: found[0].start()].rstrip(), tuple(match[2] for match in found)


def kind_of(answer: str, otherwise: str) -> str:
    """The type of an answer by its looks: ``yes_no``, ``number``, or the one given."""
    if normal(answer) in ("yes", "no", "true", "false"):
        return "yes_no"
    if _NUMBER.fullmatch(answer.strip()) or _FORMULA.fullmatch(answer.strip()):
        return "number"
    return otherwise


def placed(text: str, pictures: int) -> str:
    """Placeholders of pictures, which stand before the text here, as words or not at all."""

    def said(match: re.Match[str]) -> str:
        return f"(picture {match[1]})" if match[1] and pictures > 1 else ""

    return re.sub(r"[ \t]{2,}", " ", _PLACEHOLDER.sub(said, text)).strip()


def said_with_pictures(parts: Sequence[str | None], before: int = 0) -> str:
    """The text of parts, None standing for a picture.

    Pictures stand before the text here. Where there are several, one that stood within the
    text is named there.

    Args:
        parts: Texts and pictures in their order.
        before: Pictures of earlier parts.
    """
    shown, lines = before, []
    many = before + sum(part is None for part in parts) > 1
    for part in parts:
        if part is not None:
            lines.append(part)
            continue
        shown += 1
        if many and any(lines):
            lines.append(f"(picture {shown})")
    return "\n".join(lines)
