"""TensorBoard's event files of a training: the numbers of ``metrics.jsonl``, step by step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc.disk import disk_errors
from hpc.errors import UserError


def check_installed() -> None:
    """Tells before a model is loaded that events could not be written.

    Raises:
        UserError: The tensorboard package is not installed.
    """
    _writer()


class Events:
    """A file of events in a folder; those that earlier runs left are gone on with."""

    def __init__(self, folder: Path, step: int):
        """Opens a file.

        Args:
            folder: Where event files are; made if need be.
            step: The last step that counts: TensorBoard leaves out what another file says of
                later ones, which are taken again.
        """
        self._folder = folder
        with disk_errors(folder):
            self._writer = _writer()(str(folder), purge_step=step + 1)
            self._writer.flush()

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes the numbers of a line; a truth value is 0 or 1, keys and nulls are left out."""
        with disk_errors(self._folder):
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, float(value), line["step"])
            # So that no step before a checkpoint is lost with a process that is killed.
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _writer() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard=true needs tensorboard: pip install -e '.[tensorboard]'"
        ) from None
    return SummaryWriter
