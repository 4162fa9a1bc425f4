"""Checkpoints that are whole or not there, and resume exactly.

``step-0000123/`` holds the backend's tensors and ``state.json``: the trainer's position and
the SHA-256 of every other file. It is written under another name, synced, and renamed; one
whose digests differ is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from hpc.disk import disk_errors, sync_folder

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a training stands; data order and learning rate follow from ``step`` and config.

    Attributes:
        identity: Of configuration, base model and data; another identity is never resumed.
        step: Optimizer steps done, skipped ones included.
        samples: Samples (pairs) trained on.
        tokens: Tokens that went through the model, padding excluded.
        seconds: Time spent in steps.
        skipped: Steps passed over because the loss was not a number.
        first_loss: Of the first step; None before it.
        last_loss: Of the last step that was applied.
        dropped: Samples that could not be used: key → reason.
    """

    identity: str
    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    dropped: dict[str, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training, in one folder."""

    def __init__(self, directory: Path, keep: int):
        """Keeps the newest ``keep``; nothing is touched until the first `save`."""
        self.directory, self.keep = directory, keep

    def save(self, position: Position, write: Callable[[Path], None]) -> None:
        """Writes a checkpoint and removes those beyond the newest ``keep``.

        Args:
            position: Where the trainer stands.
            write: Puts the backend's files into the folder it is given.

        Raises:
            UserError: The disk is full, or may not be written to.
        """
        final = self.directory / f"step-{position.step:07d}"
        if final.exists():  # the same step of the same training: the same state
            return
        with writing(self.directory):
            self._write(position, write, final)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old)
        for abandoned in self.directory.glob("part-*"):
            shutil.rmtree(abandoned)

    def _write(self, position: Position, write: Callable[[Path], None], final: Path) -> None:
        part = self.directory / f"part-{position.step:07d}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        files = {path.name: _digest(path) for path in sorted(part.iterdir())}
        state = {"files": files, "position": asdict(position)}
        (part / "state.json").write_text(json.dumps(state))
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(part)
        part.replace(final)
        sync_folder(self.directory)

    def resume(self, identity: str, read: Callable[[Path], None]) -> Position | None:
        """Reads the newest whole checkpoint of this training; None if there is none.

        Damaged ones, and those of another configuration, model or data set, are removed.
        """
        for folder in reversed(self._steps()):
            position = _whole(folder)
            if position is not None and position.identity == identity:
                read(folder)
                return position
            fault = "is damaged" if position is None else "is of another configuration or data set"
            logger.warning("checkpoint %s %s: removed", folder, fault)
            shutil.rmtree(folder)
        return None

    def clear(self) -> None:
        """Removes them all; called once the trained model is in place."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full or closed disk into one line, also where safetensors meets it.

    Raises:
        UserError: No space left, or no right to write at ``path``.
    """
    with disk_errors(path):
        try:
            yield
        except SafetensorError as error:
            # The system's error number is left in the text only.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _whole(folder: Path) -> Position | None:
    try:
        state = json.loads((folder / "state.json").read_text())
        if any(_digest(folder / name) != digest for name, digest in state["files"].items()):
            return None
        return Position(**state["position"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
