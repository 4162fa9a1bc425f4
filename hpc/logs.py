"""What jobs have said."""

from __future__ import annotations

from pathlib import Path

from hpc.errors import printable


def last_line(log: Path, limit: int = 300) -> str:
    """The last line of a log that says something."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))
    return said if len(said) <= limit else said[: limit - 1] + "…"
