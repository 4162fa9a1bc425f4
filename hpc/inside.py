"""What can be told from inside a container image: its packages, and what of the host shows.

Imports nothing but the standard library, so that any image with a Python can say what it holds.
As a program, ``python -m hpc.inside``, it prints `packages` as JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import cast

_STATUS = Path("/var/lib/dpkg/status")
_DOCS = Path("/usr/share/doc")
_MODULE = re.compile(r"([A-Za-z_]\w*)(?:\.py|\.cpython-[\w-]+\.so|\.abi3\.so|\.so)?")
_PINNED = re.compile(r"(?m)^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)")


def packages() -> list[dict[str, str]]:
    """Every package of the image: kind (``pypi`` or ``deb``), name, version, licence."""
    python = {
        _normal(found.metadata["Name"]): {
            "kind": "pypi",
            "name": _normal(found.metadata["Name"]),
            "version": found.version,
            "license": _python_licence(found),
        }
        for found in importlib.metadata.distributions()
    }
    return [*(python[name] for name in sorted(python)), *_debian()]


def unlocked(lock: Path) -> list[str]:
    """In what the installed Python packages differ from a lock file, a line each."""
    there = {entry["name"]: entry["version"] for entry in packages() if entry["kind"] == "pypi"}
    wanted = {_normal(name): version for name, version in _PINNED.findall(lock.read_text())}
    differing = [
        f"{name} {there.get(name, 'is absent')}, locked is {version}"
        for name, version in wanted.items()
        if there.get(name) != version
    ]
    return differing if wanted else [f"{lock} locks nothing"]


def shadowed() -> list[str]:
    """Modules that stand before the image's own on Python's path, with where they lie."""
    own = [Path(prefix).resolve() for prefix in {sys.prefix, sys.base_prefix}]
    known = {*importlib.metadata.packages_distributions(), *sys.stdlib_module_names}
    found = []
    for entry in sys.path:
        folder = Path(entry or ".").resolve()
        if any(folder.is_relative_to(prefix) for prefix in own) or not folder.is_dir():
            continue
        for child in sorted(folder.iterdir()):
            name = _MODULE.fullmatch(child.name)
            if name and name[1] in known and (child.is_file() or any(child.glob("*.py"))):
                found.append(f"{name[1]} ({child})")
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _python_licence(found: importlib.metadata.Distribution) -> str:
    told = cast(Message, found.metadata)
    if expression := told.get("License-Expression"):
        return str(expression)
    classes = [c.rpartition(" :: ")[2] for c in told.get_all("Classifier", []) if "License" in c]
    text = (told.get("License") or "").strip().splitlines()
    return (text[0] if text and len(text[0]) < 80 else "") or "; ".join(classes)


def _debian() -> Iterator[dict[str, str]]:
    if not _STATUS.exists():
        return
    for paragraph in _STATUS.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = dict(re.findall(r"(?m)^([A-Za-z-]+): (.*)$", paragraph))
        if fields.get("Status", "").endswith(" installed"):
            yield {
                "kind": "deb",
                "name": fields["Package"],
                "version": fields["Version"],
                "license": _debian_licence(fields["Package"]),
            }


def _debian_licence(name: str) -> str:
    """The short names in a machine-readable copyright file; slim bases have none."""
    try:
        text = (_DOCS / name / "copyright").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return " AND ".join(sorted(set(re.findall(r"(?m)^License: *(\S+)", text))))


if __name__ == "__main__":
    json.dump(packages(), sys.stdout)
