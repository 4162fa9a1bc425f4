"""Reading shards: verified against their sidecars, joined by key, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hpc.disk import unreadable
from hpc.errors import UserError
from hpc.frames import Entry, ShardError, add_up, read_frames
from hpc.sidecars import SUFFIX, Sidecar, keys_digest, list_folder, read_sidecar, shard_path

Row = dict[str, Any]


def read_entries(path: Path) -> Iterator[Entry]:
    """One shard's entries as they are stored, checked against its sidecar.

    Holds one frame in memory. What it yields is checked frame by frame; that the file is
    the very one of the sidecar is known at its end.

    Raises:
        ShardError: The shard is missing, incomplete or damaged.
    """
    sidecar = read_sidecar(path)
    hasher = hashlib.sha256()
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != sidecar.bytes:
            raise _cut(file, path, size, sidecar)
        for frame in read_frames(file, path, hasher):
            yield from frame.entries
    if hasher.hexdigest() != sidecar.sha256:
        raise ShardError(path, 0, "not the file its sidecar was written for")


def read_groups(path: Path) -> Iterator[tuple[str, list[Row]]]:
    """One shard's keys with their rows, checked; a failed key comes with no rows.

    Raises:
        ShardError: The shard is missing, incomplete or damaged.
    """
    for entry in read_entries(path):
        yield entry.key, _rows(path, entry)


def read_rows(directory: Path) -> Iterator[Row]:
    """The rows of all shards of a folder, in order.

    Raises:
        ShardError: A shard is missing, incomplete or damaged.
    """
    for path in _complete(directory):
        for _, rows in read_groups(path):
            yield from rows


def read_errors(directory: Path) -> Iterator[tuple[str, str]]:
    """The failed keys of all shards of a folder and why they failed.

    Raises:
        ShardError: A shard is missing, incomplete or damaged.
    """
    for path in _complete(directory):
        if read_sidecar(path).errors:
            yield from ((entry.key, entry.error) for entry in read_entries(path) if entry.error)


def verify(path: Path) -> Sidecar:
    """Reads a whole shard and compares all its sidecar says.

    Raises:
        ShardError: The shard is missing, incomplete or damaged.
    """
    sidecar, keys, rows, errors = read_sidecar(path), list[str](), 0, 0
    for entry in read_entries(path):
        _rows(path, entry)
        keys.append(entry.key)
        rows += len(entry.rows)
        errors += bool(entry.error)
    counts = (rows, len(keys), errors, keys_digest(keys))
    if counts != (sidecar.rows, sidecar.inputs, sidecar.errors, sidecar.keys):
        raise ShardError(path, 0, "holds other rows or keys than its sidecar says")
    if len(set(keys)) != len(keys):
        raise ShardError(path, 0, "holds a key twice")
    return sidecar


def cat(path: Path) -> Iterator[str]:
    """The rows of a shard as lines of JSON, checked.

    Raises:
        ShardError: The shard is missing, incomplete or damaged.
    """
    for entry in read_entries(path):
        for row in entry.rows:
            yield row.decode()


def shard_paths(path: Path) -> list[Path]:
    """The shards a user means: one, or all of a folder or of a stage's folder.

    Raises:
        UserError: There are none.
    """
    if path.name.endswith(SUFFIX):
        return [path]
    for directory in (path, path / "shards"):
        folder = list_folder(directory) if directory.is_dir() else None
        if folder is not None and (folder.complete or folder.files):
            return [shard_path(directory, at) for at in sorted(folder.complete | folder.files)]
    raise UserError(f"{path}: no shards here; name a file ending in {SUFFIX} or a stage's folder")


def join(directories: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, list[Row]]]]:
    """Walks aligned stages by key: the keys of the first, with the rows of all.

    Memory holds a frame of each, and of a stage whose keys are in another order at most a
    shard.

    Args:
        directories: Role to folder of shards; the first one gives the order.

    Yields:
        A key and its rows by role.

    Raises:
        ShardError: A shard is missing, incomplete or damaged.
        UserError: A stage lacks a key the first one has, or has another one.
    """
    first = next(iter(directories.values()))
    for path in _complete(first):
        yield from join_shard(directories, int(path.name.removesuffix(SUFFIX)))


def join_shard(
    directories: Mapping[str, Path], index: int, skip: set[str] | frozenset[str] = frozenset()
) -> Iterator[tuple[str, dict[str, list[Row]]]]:
    """Shard ``index`` of aligned stages by key, like `join`.

    Args:
        directories: Role to folder of shards; the first one gives the order.
        index: The shard's number.
        skip: Keys whose rows are not wanted: they come with no roles at all.
    """
    roles = list(directories)
    paths = {role: shard_path(directories[role], index) for role in roles}
    for role in roles[1:]:
        _check_aligned(paths[roles[0]], paths[role])
    others = {role: Picker(read_entries(paths[role])) for role in roles[1:]}
    for entry in read_entries(paths[roles[0]]):
        found = {roles[0]: entry} | {role: other.take(entry.key) for role, other in others.items()}
        if entry.key in skip:
            yield entry.key, {}
        else:
            yield entry.key, {role: _rows(paths[role], found[role]) for role in roles}


class Picker:
    """Entries by key from a stream that is nearly in the order they are asked for."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._entries, self._passed = entries, dict[str, Entry]()

    def take(self, key: str) -> Entry:
        """The entry of a key that must be there; those on the way are kept for later."""
        while key not in self._passed:
            entry = next(self._entries)
            self._passed[entry.key] = entry
        return self._passed.pop(key)


def _check_aligned(first: Path, other: Path) -> None:
    """Names the key that one of two shards lacks."""
    if read_sidecar(first).keys == read_sidecar(other).keys:
        return
    wanted, found = (list(read_entries(path)) for path in (first, other))
    lacking = {entry.key for entry in wanted} - {entry.key for entry in found}
    surplus = {entry.key for entry in found} - {entry.key for entry in wanted}
    what = f"lacks key {min(lacking)!r}" if lacking else f"has key {min(surplus)!r}, unknown"
    raise UserError(
        f"{other}: {what} to stage {first.parent.parent.name}; "
        f"remake stage {other.parent.parent.name}"
    )


def _complete(directory: Path) -> list[Path]:
    """The shards of a folder, which must be numbered without gaps and all be complete."""
    folder = list_folder(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: there are no shards; run the stage that makes them")
    count = max(folder.complete | folder.files, default=-1) + 1
    paths = [shard_path(directory, index) for index in range(count)]
    for index, path in enumerate(paths):
        if index not in folder.complete or index not in folder.files:
            read_sidecar(path)
            raise ShardError(path, 0, "there is no such shard")
    return paths


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise ShardError(path, 0, "there is no such shard") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _cut(file: BinaryIO, path: Path, size: int, sidecar: Sidecar) -> ShardError:
    """Says where a shard of the wrong size breaks off."""
    try:
        for _ in read_frames(file, path):
            pass
    except ShardError as error:
        return error
    return ShardError(path, size, f"cut or grown between frames, {sidecar.bytes} bytes expected")


def _rows(path: Path, entry: Entry) -> list[Row]:
    try:
        rows = [json.loads(row) for row in entry.rows]
    except ValueError:
        rows = [None]
    if not all(isinstance(row, dict) for row in rows):
        raise ShardError(path, 0, f"rows of key {entry.key!r} that are no JSON objects")
    return rows


def inspect(path: Path, generation: int, counted: Sequence[str] = ()) -> Sidecar | None:
    """What the sidecar of a whole shard would say; None for a damaged one."""
    hasher, keys, rows, errors = hashlib.sha256(), list[str](), 0, 0
    sums = dict.fromkeys(counted, 0)
    try:
        with _open(path) as file:
            for frame in read_frames(file, path, hasher):
                keys += [entry.key for entry in frame.entries]
                rows += sum(len(entry.rows) for entry in frame.entries)
                errors += sum(bool(entry.error) for entry in frame.entries)
                for entry in frame.entries:
                    add_up(sums, entry)
            size = file.tell()
    except ShardError:
        return None
    digest, named = hasher.hexdigest(), keys_digest(keys)
    return Sidecar(rows, len(keys), errors, size, digest, named, generation, sums)
