"""Prompts are versioned text files: ``prompts/<set>/<role>.txt``.

``default`` is written for instruction-following models, ``tiny`` for the embedded one.
A field is written ``{name}``; every other brace is literal. A set's version is its name
with a digest of its files, so a changed word is a changed stage.

A role's file must hold the role's required fields and may hold its other ones.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from hpc.errors import UserError

FOLDER = Path(__file__).parent / "prompts"
ROLES = {
    "direct": (("question",), ()),
    "reasoning": (("question",), ()),
    "final": ((), ("question",)),
    "summary": (("question", "reasoning"), ()),
    "plain_summary": (("question",), ()),
    "score": (("question", "paths"), ("count",)),
    "judge": (("truth", "answer"), ("question",)),
    "table": ((), ()),
}
"""Each role's required fields, and the others it may use."""
_FIELD = re.compile(r"\{(question|reasoning|paths|truth|answer|count)\}")
_MEANT = re.compile(r"\{([a-z_]{2,})\}")


class Prompts:
    """One set of prompts."""

    def __init__(self, texts: dict[str, str], name: str):
        """Takes the texts by role; use ``load_prompts`` to read a set."""
        self._texts = texts
        text = "\x1f".join(f"{role}\x1f{texts[role]}" for role in sorted(texts))
        self.version = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def render(self, role: str, **fields: str | int) -> str:
        """The prompt of ``role`` with its fields filled; values are never re-read for fields.

        Raises:
            KeyError: The prompt names a field that was not given.
        """
        return _FIELD.sub(lambda match: str(fields[match[1]]), self._texts[role])


@lru_cache
def load_prompts(name: str) -> Prompts:
    """Reads a set by name (shipped) or path (a folder of one's own).

    Raises:
        UserError: No such set, a file of it is missing, or has other fields than its role's.
    """
    folder = FOLDER / name if (FOLDER / name).is_dir() else Path(name)
    if not folder.is_dir():
        shipped = ", ".join(sorted(path.name for path in FOLDER.iterdir()))
        raise UserError(f"no prompt set {name!r}: give a folder, or one of {shipped}")
    missing = [role for role in ROLES if not (folder / f"{role}.txt").is_file()]
    if missing:
        raise UserError(f"prompt set {folder} has no {missing[0]}.txt")
    return Prompts({role: _text(folder / f"{role}.txt", role) for role in ROLES}, folder.name)


def _text(path: Path, role: str) -> str:
    """A role's prompt.

    Raises:
        UserError: It is empty or no UTF-8, lacks a field, or names one its role does not have.
    """
    try:
        text = path.read_text(encoding="utf-8").rstrip("\n")
    except UnicodeDecodeError:
        raise UserError(f"prompt {path} is not UTF-8 text; save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"prompt {path} is empty; write what the model is to be told")
    required, optional = ROLES[role]
    known = (*required, *optional)
    found = _MEANT.findall(text)
    allowed = "it may use " + ", ".join(f"{{{name}}}" for name in known) if known else "it has none"
    if missing := [name for name in required if name not in found]:
        raise UserError(f"prompt {path} lacks the field {{{missing[0]}}}; {allowed}")
    if wrong := [name for name in found if name not in known]:
        raise UserError(f"prompt {path} names the field {{{wrong[0]}}}; {allowed}")
    return text
