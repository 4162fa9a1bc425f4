"""Checkpoints that are whole or not there, and resume exactly.

``step-0000123/`` holds the backend's tensors and ``state.json``: the trainer's position and
the SHA-256 of every other file. It is written under another name, synced, and renamed; one
whose digests differ is passed over for the one before it. All ranks write and check together,
and the first one renames.

What is saved is copied first; a thread of each rank writes the copy while training goes on. The
threads agree over connections of their own, and whoever needs what they do waits for them: the
next save, the end, a wish to stop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from hpc.disk import disk_errors, share, sync_folder
from hpc.errors import UserError
from insightv.training.ranks import Ranks

logger = logging.getLogger(__name__)

Write = Callable[[Path], None]
"""Writes a rank's part of a checkpoint into a folder; meanwhile the state it is of may change."""


@dataclass
class Position:
    """Where a training stands; data order and learning rate follow from ``step`` and config.

    Attributes:
        identity: Of configuration, base model and data; another identity is never resumed.
        step: Optimizer steps done, skipped ones included.
        samples: Samples (pairs) trained on.
        tokens: Tokens that went through the model, padding excluded.
        seconds: Time spent in steps.
        skipped: Steps passed over: the loss was not a number, or the gradient a spike.
        norms: Gradient norms of the last steps that were applied, where spikes are looked for.
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
    norms: list[float] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training, in one folder."""

    def __init__(self, directory: Path, keep: int, ranks: Ranks | None = None):
        """Keeps the newest ``keep``; nothing is touched until the first `save`.

        Args:
            directory: On a file system that all ranks see.
            keep: How many stay.
            ranks: Those of the training; all of them make each call.
        """
        self.directory, self.keep, self.ranks = directory, keep, ranks or Ranks()
        self._aside = self.ranks.aside()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(self, position: Position, snapshot: Callable[[], Write]) -> None:
        """Begins a checkpoint, once the one before is written.

        Those beyond the newest ``keep`` are removed when it is whole.

        Args:
            position: Where the trainer stands.
            snapshot: Copies the backend's state, and returns what writes the copy.

        Raises:
            UserError: The one before could not be written.
        """
        self.wait()
        name = f"{position.step:07d}"
        part, final = self.directory / f"part-{name}", self.directory / f"step-{name}"
        # The same step of the same training is the same state.
        if self.ranks.first(final.exists):
            return
        made: list[Write] = []
        self.ranks.every(lambda: made.append(snapshot()))
        self._pending = self._thread.submit(self._write, part, final, made[0], asdict(position))

    def failed(self) -> bool:
        """Whether what is being written has failed; then `wait` says why, on all ranks."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            UserError: The disk is full, or may not be written to.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the thread; what it could not write is nobody's concern any more."""
        self._thread.shutdown()

    def _write(self, part: Path, final: Path, write: Write, position: dict[str, Any]) -> None:
        self._aside.first(lambda: self._begin(part))
        self._aside.every(lambda: self._written(part, write))
        files = self._digests(part)
        self._aside.first(lambda: self._complete(part, final, files, position))

    def _begin(self, part: Path) -> None:
        with writing(self.directory):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def _written(self, part: Path, write: Write) -> None:
        with writing(self.directory):
            write(part)

    def _digests(self, folder: Path) -> dict[str, str]:
        """SHA-256 of each file, which each rank syncs and reads its share of."""
        # A network file system may yet hide from one node what another has written.
        seen = self._aside.every(lambda: [path.name for path in folder.iterdir()])
        names = sorted({name for some in seen for name in some})

        def own() -> dict[str, str]:
            found = {}
            for name in names[self.ranks.rank :: self.ranks.count]:
                with writing(folder), (folder / name).open("rb") as file:
                    os.fsync(file.fileno())
                    found[name] = hashlib.file_digest(file, "sha256").hexdigest()
            return found

        return {name: digest for part in self._aside.every(own) for name, digest in part.items()}

    def _complete(
        self, part: Path, final: Path, files: dict[str, str], position: dict[str, Any]
    ) -> None:
        with writing(self.directory):
            with (part / "state.json").open("w") as file:
                file.write(json.dumps({"files": files, "position": position}))
                file.flush()
                os.fsync(file.fileno())
            share(part)
            sync_folder(part)
            part.replace(final)
            sync_folder(self.directory)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old)
        for abandoned in self.directory.glob("part-*"):
            shutil.rmtree(abandoned)

    def resume(self, identity: str, read: Callable[[Path], None]) -> Position | None:
        """Reads the newest whole checkpoint of this training; None if there is none.

        Damaged ones are removed.

        Raises:
            UserError: A whole one is of another configuration, model or data set.
        """
        for name in reversed(self.ranks.first(lambda: [path.name for path in self._steps()])):
            folder = self.directory / name
            position = self._whole(folder)
            if position is not None and position.identity == identity:
                self.ranks.every(partial(read, folder))
                return position
            if position is not None:
                self.ranks.first(partial(_refuse, folder))
            if self.ranks.lead:
                logger.warning("checkpoint %s is damaged: removed", folder)
            self.ranks.first(partial(shutil.rmtree, folder))
        return None

    def _whole(self, folder: Path) -> Position | None:
        """The position of a checkpoint whose files are all as they were written."""
        state = self.ranks.first(lambda: _state(folder))
        if state is None:
            return None
        names = sorted(state["files"])[self.ranks.rank :: self.ranks.count]
        if self.ranks.any(any(_digest(folder / name) != state["files"][name] for name in names)):
            return None
        return Position(**state["position"])

    def clear(self) -> None:
        """Removes them all; called once the trained model is in place."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in this node's memory, which what happens to the originals does not reach."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def opened(folder: Path) -> Position:
    """The position of one checkpoint, whose every file is as it was written.

    Raises:
        UserError: It is none, or damaged.
    """
    state = _state(folder)
    if state is None:
        raise UserError(f"{folder} is no checkpoint: give a folder checkpoints/step-…")
    for name, digest in state["files"].items():
        if Path(name).name != name or _digest(folder / name) != digest:
            raise UserError(f"checkpoint {folder} is damaged ({name}); take another one")
    return Position(**state["position"])


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


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        Position(**state["position"])
        return state if isinstance(state["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path) -> str:
    """SHA-256 of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _refuse(folder: Path) -> None:
    raise UserError(
        f"checkpoint {folder} is of another configuration, model or data set; give the same to "
        f"go on with it, or remove {folder.parent} to begin anew"
    )
