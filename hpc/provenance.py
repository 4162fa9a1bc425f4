"""Where a result comes from: code, packages, host, image and command."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.errors import UserError

# An argument like api_key=… must not be kept beside the results.
_SECRET = re.compile(r"(?i)(api[_-]?key|token(?!s)|secret|passw|credential)[^=]*=")


def describe(packages: Sequence[str] = ("hpc",)) -> dict[str, Any]:
    """Which code, packages, host and command are at work; never the environment's secrets."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": {name: _code(name) for name in packages},
        "python": platform.python_version(),
        "packages": {
            item.metadata["Name"]: item.version
            for item in sorted(
                importlib.metadata.distributions(), key=lambda item: str(item.metadata["Name"])
            )
        },
        "image": image(),
        "host": {
            "name": socket.gethostname(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
        },
        "command": [_hide(word) for word in sys.argv],
    }


def _hide(word: str) -> str:
    found = _SECRET.search(word)
    return word[: found.end()] + "…" if found else word


def _code(package: str) -> dict[str, Any]:
    """A digest of a package's sources, and the commit where it lies in a git work tree."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"package {package} is not installed; install it to record its code")
    folder = Path(next(iter(found.submodule_search_locations)))
    summed = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        summed.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    code: dict[str, Any] = {"sources": summed.hexdigest()[:16]}
    commit = _git(folder, "rev-parse", "HEAD")
    # A package installed below somebody else's repository has nothing to do with its commits.
    if commit and _git(folder, "ls-files", "--error-unmatch", "__init__.py"):
        code["commit"] = commit
        code["changed"] = bool(_git(folder, "status", "--porcelain", "--", "."))
    return code


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def image() -> dict[str, Any] | None:
    """The container image this process works in: its path and digest; None outside of any.

    Whoever starts the container may give both as ``HPC_IMAGE`` and ``HPC_IMAGE_SHA256``, which
    saves reading some gigabytes at each start, and names the image where a copy is at work.
    """
    path = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    if not path:
        return None
    if known := os.environ.get("HPC_IMAGE_SHA256"):
        return {"path": os.environ.get("HPC_IMAGE", path), "sha256": known}
    try:
        with Path(path).open("rb") as file:
            return {"path": path, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError:
        return {"path": path, "sha256": None}
