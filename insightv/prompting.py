"""Prompts are versioned text files: ``prompts/<set>/<role>.txt``.

``default`` is written for instruction-following models, ``tiny`` for the embedded one.
A field is written ``{name}``; every other brace is literal. A set's version is its name
with a digest of its files, so a changed word is a changed stage.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from hpc.errors import UserError

FOLDER = Path(__file__).parent / "prompts"
ROLES = ("direct", "reasoning", "final", "summary", "plain_summary", "score", "judge", "table")
_FIELD = re.compile(r"\{(question|reasoning|paths|truth|answer|count)\}")


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
        UserError: No such set, or one of its files is missing.
    """
    folder = FOLDER / name if (FOLDER / name).is_dir() else Path(name)
    if not folder.is_dir():
        shipped = ", ".join(sorted(path.name for path in FOLDER.iterdir()))
        raise UserError(f"no prompt set {name!r}: give a folder, or one of {shipped}")
    missing = [role for role in ROLES if not (folder / f"{role}.txt").is_file()]
    if missing:
        raise UserError(f"prompt set {folder} has no {missing[0]}.txt")
    texts = {role: (folder / f"{role}.txt").read_text().rstrip("\n") for role in ROLES}
    return Prompts(texts, folder.name)
