"""A Hugging Face folder's tensors: read piece by piece, and held against what a model needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpc.errors import UserError
from insightv.training.folder import INDEX
from insightv.training.megatron.families import (
    IGNORED,
    Dialect,
    dialect_of,
    language_name,
    shape_of,
    tensors_of,
    vision_name,
)
from insightv.training.megatron.model import vision_part


@dataclass(frozen=True)
class Span:
    """A piece of a tensor: places ``start`` to ``stop`` along ``dimension``."""

    tensor: str
    dimension: int
    start: int
    stop: int

    def of(self, whole: Any) -> Any:
        """The piece of a tensor, or of a slice of a file."""
        if self.dimension == 0:
            return whole[self.start : self.stop]
        return whole[:, self.start : self.stop]


class Folder:
    """A model folder's tensors, read piece by piece.

    Attributes:
        path: The folder.
        shapes: Shape of each tensor, by the name it has there.
    """

    def __init__(self, path: Path):
        """Opens every safetensors file; nothing is read but their headers.

        Raises:
            UserError: There are none, or one is damaged.
        """
        self.path = path
        self._files = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in _files_of(path):
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is damaged: {error}; fetch the model again") from None
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                self._files[name] = opened
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def read(self, name: str, span: Span) -> Tensor:
        """A piece of one tensor."""
        tensor: Tensor = span.of(self._files[name].get_slice(name))
        return tensor

    def whole(self, name: str) -> Tensor:
        """One tensor."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _files_of(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        # An index is data: it may name files of this folder, nothing else.
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index} names files outside its folder")
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of its weight files, e.g. {missing[0]}")
    if not files:
        raise UserError(f"{path} has no *.safetensors; other formats of weights are not read")
    return files


@dataclass(frozen=True)
class Naming:
    """Where each tensor of a model stands in a folder.

    Attributes:
        dialect: The folder's spelling.
        language: Language model's tensors: name in the table → shape.
        vision: Vision part's tensors: name in the module → shape.
        tied: Whether the head is the embedding.
    """

    dialect: Dialect
    language: dict[str, tuple[int, ...]]
    vision: dict[str, tuple[int, ...]]
    tied: bool

    def place(self, name: str) -> str:
        """Where ``language.…`` or ``vision.…`` stands in the folder."""
        part, _, rest = name.partition(".")
        spell = language_name if part == "language" else vision_name
        return spell(self.dialect, rest)

    @classmethod
    def of(cls, config: Any, shapes: dict[str, tuple[int, ...]]) -> Naming:
        """Finds the spelling of a folder whose tensors have these shapes.

        Raises:
            UserError: The family is not supported, or no spelling fits.
        """
        with torch.device("meta"):
            vision = vision_part(config)
        names = {name: tuple(tensor.shape) for name, tensor in vision.state_dict().items()}
        shape = shape_of(config)
        dialect = dialect_of(config.model_type, shapes.__contains__, list(names))
        return cls(dialect, tensors_of(shape), names, shape.tied)

    def check(self, folder: Folder) -> None:
        """Holds the folder against what the model needs.

        Raises:
            UserError: A table of tensors that are missing, extra or of the wrong shape.
        """
        there, rows = folder.shapes, []
        needed = {self.place(f"language.{name}"): size for name, size in self.language.items()}
        needed |= {self.place(f"vision.{name}"): size for name, size in self.vision.items()}
        for name, size in needed.items():
            if name not in there:
                rows.append((name, "missing", str(size), ""))
            elif there[name] != size:
                rows.append((name, "wrong shape", str(size), str(there[name])))
        for name in there.keys() - needed.keys():
            if not name.endswith(IGNORED) and not (self.tied and name == self.dialect.head):
                rows.append((name, "extra", "", str(there[name])))
        if rows:
            listing = _listing(sorted(rows))
            raise UserError(
                f"weights in {folder.path} do not fit its config.json in {len(rows)} tensors; "
                f"fetch the model again:\n{listing}"
            )


def _listing(rows: list[tuple[str, str, str, str]], most: int = 40) -> str:
    table = Table("tensor", "is", "config.json asks for", "the folder holds")
    for row in rows[:most]:
        table.add_row(*row)
    if len(rows) > most:
        table.add_row(f"… {len(rows) - most} more")
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
