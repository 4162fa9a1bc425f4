"""Model folders as a configuration names them, looked at without loading anything."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import insightv
from hpc.disk import unreadable
from hpc.errors import UserError

EMBEDDED = "tiny"
"""Names the model that is shipped with the package."""

TOWERS = ("vision_tower", "visual", "vision_model")
"""Names of the module that sees, in the families' code and weights."""
PROJECTORS = ("merger", "deepstack_merger_list")
"""Names of projectors that stand inside that module."""

_BLOCK = 1 << 16
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def model_folder(path: str) -> Path:
    """The folder of a configured model."""
    return Path(insightv.__file__).parent / "demo" / "model" if path == EMBEDDED else Path(path)


def is_gguf(path: Path) -> bool:
    """Whether a model is one file, as llama.cpp has it, not a folder."""
    return path.suffix == ".gguf" and not path.is_dir()


def gguf_parts(path: Path) -> list[Path]:
    """The file, or all files of a model that was split: ``NAME-00001-of-00003.gguf`` and on.

    Raises:
        UserError: One is missing or no GGUF, or this is not the first.
    """
    named = _PART.fullmatch(path.name)
    if named and int(named[2]) != 1:
        raise UserError(f"{path} is not the first part of its model; give the one with 00001")
    numbers = range(1, int(named[3]) + 1) if named else ()
    parts = [path.with_name(f"{named[1]}-{n:05}-of-{named[3]}.gguf") for n in numbers if named]
    for part in parts or [path]:
        try:
            with part.open("rb") as file:
                known = file.read(4) == b"GGUF"
        except OSError as error:
            raise unreadable(part, error) from None
        if not known:
            raise UserError(f"{part} is no GGUF file; fetch it again")
    return parts or [path]


def fingerprint(folder: Path) -> str:
    """Tells models apart without reading gigabytes: sizes and samples of their weights.

    Raises:
        UserError: There is no model in Hugging Face format and no GGUF file, or it may not be read.
    """
    files = gguf_parts(folder) if is_gguf(folder) else _folder_files(folder)
    summed = hashlib.sha256()
    try:
        for path in files:
            add_samples(summed, path, 64)
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from None
    return summed.hexdigest()[:16]


def _folder_files(folder: Path) -> list[Path]:
    """What a folder's fingerprint is taken of.

    Raises:
        UserError: It is no model in Hugging Face format, or may not be read.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give a model in Hugging Face format, or tiny")
    config, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config.is_file() or not weights:
        raise UserError(f"{folder} is no model: it needs config.json and *.safetensors")
    try:
        _check_config(config)
        _check_weights(folder, weights)
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from None
    return [config, *weights]


def add_samples(summed: hashlib._Hash, path: Path, blocks: int) -> None:
    """Adds to a digest what a file is called, its size, and ``blocks`` of 64 KiB spread over it.

    A file that is shorter than they are is added whole.
    """
    size = path.stat().st_size
    summed.update(f"{path.name}\0{size}\0".encode())
    with path.open("rb") as file:
        for place in range(0, size, max(_BLOCK, size // blocks)):
            file.seek(place)
            summed.update(file.read(_BLOCK))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a model folder that `fingerprint` takes, by its name there."""
    heads = (_head(path)[1] for path in sorted(folder.glob("*.safetensors")))
    return {name: tuple(entry["shape"]) for head in heads for name, entry in head.items()}


def _head(path: Path) -> tuple[int, dict[str, Any]]:
    """The head of a safetensors file, and how many bytes it takes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(length if length < path.stat().st_size else 0))
    return length, {name: entry for name, entry in head.items() if name[:2] != "__"}


def _check_config(path: Path) -> None:
    """Refuses what is no model's configuration.

    Raises:
        UserError: It is damaged, or does not say what kind of model it is of.
    """
    try:
        kind = json.loads(path.read_text())["model_type"]
    except (ValueError, TypeError, KeyError):
        kind = None
    if not isinstance(kind, str):
        raise UserError(f"{path} is damaged, or names no model_type; fetch it again")


def _check_weights(folder: Path, weights: Sequence[Path]) -> None:
    """Finds cut and missing weights by the files' own heads, before any work has begun.

    A safetensors file begins with the length of its head (8 bytes, little-endian) and the head,
    JSON, in which each tensor has the offsets of its bytes behind the head.

    Raises:
        UserError: A file is cut off or is none, or one that the folder's index names is missing.
    """
    for path in weights:
        size = path.stat().st_size
        try:
            length, head = _head(path)
            wanted = (
                8 + length + max((entry["data_offsets"][1] for entry in head.values()), default=0)
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise UserError(f"{path} is no safetensors file, or cut off; fetch it again") from None
        if size != wanted:
            raise UserError(f"{path} has {size:,} of {wanted:,} bytes; fetch it again")
    index = folder / "model.safetensors.index.json"
    try:
        listed = set(json.loads(index.read_text())["weight_map"].values())
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{index} is no index of weights; fetch it again") from None
    if missing := sorted(listed - {path.name for path in weights}):
        raise UserError(f"{folder} lacks {missing[0]}, which its index names; fetch it again")
