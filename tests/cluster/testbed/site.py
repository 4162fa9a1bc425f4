"""A Slurm that is there already, used as whoever runs the tests: nothing of it is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import machines
from .layout import TestbedError

PLACE = "INSIGHTV_TEST_SITE"
"""The variable that names a folder which every node sees; by default the home folder."""


def answers() -> bool:
    """Whether a Slurm takes commands here."""
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=60).returncode == 0


class Site:
    """What tests need of a cluster that nobody may break; see `Testbed`.

    Attributes:
        partition: Where jobs go: the site's default.
    """

    partition = ""

    def __init__(self) -> None:
        self._place = Path(os.environ.get(PLACE) or Path.home()) / "insightv-tests"

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command here.

        Raises:
            TestbedError: It fails, unless ``check`` is off.
        """
        path = {"PYTHONPATH": str(machines.REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **path, **(env or {})},
            cwd=cwd,
            **options,
        )
        if check and done.returncode:
            shown, said = " ".join(map(str, command)), (done.stderr + done.stdout).strip()
            raise TestbedError(f"{shown}: status {done.returncode}: {said}")
        return done

    def folder(self, name: str) -> Path:
        """A fresh folder; it stays when a test fails, for whoever looks."""
        path = self._place / f"{name}-{time.time_ns():x}"
        path.mkdir(parents=True)
        return path
