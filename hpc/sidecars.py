"""The names in a folder of shards, and the sidecars that make shards complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hpc.disk import disk_errors, unreadable, write_atomic
from hpc.frames import ShardError

SUFFIX = ".jsonl.zst"
_NAME = re.compile(r"(\d{5,})(?:\.(\d+)\.part(?:\.tmp)?|\.json|\.jsonl\.zst)")


@dataclass(frozen=True)
class Sidecar:
    """What a complete shard holds.

    Attributes:
        rows: Rows in it.
        inputs: Keys in it, failed ones included.
        errors: Keys that failed.
        bytes: Size of the file.
        sha256: Digest of the file.
        keys: Digest of its sorted keys; equal in aligned shards.
        generation: Of the lease it was made under.
        sums: What `Stage.counted` names, summed over its rows; nothing where it names none.
    """

    rows: int
    inputs: int
    errors: int
    bytes: int
    sha256: str
    keys: str
    generation: int
    sums: dict[str, int] = field(default_factory=dict)


def shard_path(directory: Path, index: int) -> Path:
    """Where shard ``index`` is."""
    return directory / f"{index:05d}{SUFFIX}"


def sidecar_path(shard: Path) -> Path:
    """Where a shard's sidecar is."""
    return shard.with_name(shard.name.removesuffix(SUFFIX) + ".json")


def part_path(directory: Path, index: int, generation: int) -> Path:
    """Where a shard is made under a lease of ``generation``."""
    return directory / f"{index:05d}.{generation}.part"


def keys_digest(keys: Iterable[str]) -> str:
    """The digest of a set of keys."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()


def write_sidecar(shard: Path, sidecar: Sidecar, sync_names: bool = True) -> None:
    """Marks a shard as complete; ``sync_names`` makes the names in its folder durable, too."""
    value = asdict(sidecar)
    if not sidecar.sums:
        del value["sums"]
    write_atomic(sidecar_path(shard), json.dumps(value) + "\n", sync_names)


def read_sidecar(shard: Path) -> Sidecar:
    """The sidecar of a shard.

    Raises:
        ShardError: It is missing or no sidecar.
        UserError: It may not be read.
    """
    path = sidecar_path(shard)
    try:
        value = json.loads(path.read_bytes())
        sums = value.pop("sums", {})
        kinds = {field.name: field.type for field in fields(Sidecar) if field.name != "sums"}
        if {name: type(held).__name__ for name, held in value.items()} != kinds:
            raise ValueError
        if not all(type(held) is int for held in sums.values()):
            raise ValueError
        return Sidecar(**value, sums=sums)
    except (FileNotFoundError, NotADirectoryError):
        there = "its sidecar is missing" if shard.exists() else "there is no such shard"
        raise ShardError(shard, 0, there) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, AttributeError, TypeError):
        raise ShardError(path, 0, "not a sidecar") from None


def sidecars(directory: Path) -> dict[int, Sidecar]:
    """All sidecars of a folder by index, in order; empty for an absent folder.

    Raises:
        ShardError: One cannot be read.
    """
    complete = sorted(list_folder(directory).complete)
    return {index: read_sidecar(shard_path(directory, index)) for index in complete}


@dataclass(frozen=True)
class Folder:
    """What one listing of a folder of shards tells.

    Attributes:
        complete: Indices that have a sidecar.
        generations: Index to the highest generation of its parts.
        files: Indices that have a shard file, complete or not.
    """

    complete: set[int]
    generations: dict[int, int]
    files: set[int]

    def floor(self, index: int) -> int:
        """The lowest generation a new lease on the shard may have."""
        return max(self.generations.get(index, -1) + 1, int(index in self.files))


def list_folder(directory: Path) -> Folder:
    """Lists a folder of shards once; an absent one is empty."""
    folder = Folder(set(), {}, set())
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        return folder
    for name in names:
        if not (match := _NAME.fullmatch(name)):
            continue
        index = int(match[1])
        if name.endswith(".part"):
            generation = int(match[2])
            folder.generations[index] = max(generation, folder.generations.get(index, 0))
        elif name.endswith(".json"):
            folder.complete.add(index)
        elif name.endswith(SUFFIX):
            folder.files.add(index)
    return folder


def clear(directory: Path) -> None:
    """Removes all shards and parts of a folder; the sidecars, which make them count, first."""
    paths = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    with disk_errors(directory):
        for path in sorted(paths, key=lambda path: path.suffix != ".json"):
            path.unlink(missing_ok=True)


def remove_parts(directory: Path, index: int, generation: int) -> None:
    """Removes the part of a shard's generation and those of all before it."""
    for older in range(generation, -1, -1):
        part = part_path(directory, index, older)
        part.unlink(missing_ok=True)
        part.with_name(part.name + ".tmp").unlink(missing_ok=True)
