"""Shards: rows of JSON under keys, in files that prove themselves whole.

A shard ``NNNNN.jsonl.zst`` holds the frames of `hpc.frames`. It is complete when its
sidecar ``NNNNN.json`` stands beside it, and only then. While it is made it is a part,
``NNNNN.<generation>.part``, of which a successor takes over the whole frames.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.disk import disk_errors, make_folder, sync_folder
from hpc.errors import UserError
from hpc.frames import Entry, ShardError, encode_row, marked_keys, read_frames, whole_frames
from hpc.leases import LostLease
from hpc.parts import Limits, Part
from hpc.reading import (
    Picker,
    Row,
    cat,
    inspect,
    join,
    join_shard,
    read_entries,
    read_errors,
    read_groups,
    read_rows,
    shard_paths,
    verify,
)
from hpc.sidecars import (
    SUFFIX,
    Sidecar,
    clear,
    keys_digest,
    list_folder,
    part_path,
    read_sidecar,
    remove_parts,
    shard_path,
    sidecar_path,
    sidecars,
    write_sidecar,
)

__all__ = [
    "Limits",
    "LostLease",
    "Repair",
    "Row",
    "ShardError",
    "ShardWriter",
    "Sidecar",
    "adopt",
    "cat",
    "clear",
    "join",
    "join_shard",
    "keys_digest",
    "list_folder",
    "part_path",
    "read_entries",
    "read_errors",
    "read_groups",
    "read_rows",
    "read_sidecar",
    "repair",
    "shard_path",
    "shard_paths",
    "sidecar_path",
    "sidecars",
    "verify",
    "write_groups",
    "write_sidecar",
]


class ShardWriter:
    """One output shard, in the making.

    Args:
        directory: The folder of the stage's shards; made if need be.
        index: The shard's number.
        generation: Of the lease it is made under.
        resume: The part of a predecessor; its whole frames are taken over.
        limits: When a frame is closed.
        counted: Fields of its rows whose whole numbers its sidecar sums up.

    Attributes:
        done: The keys that are finished, failed ones and those taken over included.

    Raises:
        LostLease: Another writer has this generation.
        UserError: The folder cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        index: int,
        generation: int = 0,
        resume: Path | None = None,
        limits: Limits | None = None,
        counted: Sequence[str] = (),
    ) -> None:
        """Opens the part."""
        self.path = shard_path(make_folder(directory), index)
        self.index, self.generation = index, generation
        self._limits, self._counted = limits or Limits(), tuple(counted)
        self._name = part_path(directory, index, generation)
        try:
            self._part = self._resume(resume) if resume else self._new(self._name)
        except FileExistsError:
            raise LostLease(f"{self._name}: another writer is at work") from None
        self.done: set[str] = set(self._part.keys)

    def add(self, key: str, rows: Sequence[Mapping[str, Any]], error: str = "") -> None:
        """Stores a key's outcome: its rows, or why it failed.

        Raises:
            ValueError: The key is there already, has both rows and an error, or holds what
                has no JSON form.
            UserError: The disk is full. Nothing that was added is lost: `flush` tries again.
        """
        if key in self.done:
            raise ValueError(f"{self.path}: key {key!r} twice")
        if rows and error:
            raise ValueError(f"{self.path}: key {key!r} has rows and an error")
        key.encode()
        entry = Entry(key, [encode_row(dict(row)) for row in rows], error)
        self.done.add(key)
        self._part.append(entry)

    def flush(self) -> None:
        """Closes the frame and makes all that was added durable."""
        self._part.flush()
        self._part.sync()

    def flush_if_old(self) -> None:
        """Flushes when the frame's oldest row has waited for the limit's seconds."""
        if self._part.age() >= self._limits.seconds:
            self.flush()

    def commit(self, order: Sequence[str] | None = None) -> Sidecar:
        """Makes the shard complete: all on disk, an exclusive link, then the sidecar.

        Args:
            order: The order its keys shall have in the file. With it the same rows give the
                same bytes, in whatever order they came and however often work was resumed.

        Raises:
            LostLease: Another writer has committed, or has cleared the folder.
            UserError: The disk is full or knows no hard links.
        """
        sidecar = self._publish(order)
        if not self._linked():
            raise LostLease(f"{self.path}: another writer has replaced it")
        write_sidecar(self.path, sidecar)
        self._part.close()
        remove_parts(self.path.parent, self.index, self.generation)
        return sidecar

    def abandon(self) -> None:
        """Closes the part and leaves it, whole frames and all, to a successor."""
        self._part.close()

    def _publish(self, order: Sequence[str] | None) -> Sidecar:
        """All but the sidecar."""
        if order is not None and not (self._part.even and self._part.keys == list(order)):
            self._sort(order)
        self._part.finish()
        if not self._part.ours():
            raise LostLease(f"{self._name}: removed by another writer")
        with disk_errors(self.path):
            try:
                os.link(self._part.path, self.path)
            except FileExistsError:
                # A network file system may repeat a link that had already succeeded.
                if not self._linked():
                    raise LostLease(f"{self.path}: another writer has committed") from None
            except FileNotFoundError:
                raise LostLease(f"{self._name}: removed by another writer") from None
        return self._part.sidecar(self.generation)

    def _linked(self) -> bool:
        try:
            return self.path.samefile(self._part.path)
        except FileNotFoundError:
            return False

    def _sort(self, order: Sequence[str]) -> None:
        """Writes the frames again, with their keys in the order asked for."""
        if len(order) != len(self.done) or set(order) != self.done:
            raise ValueError(f"{self.path}: its keys are not those it is to be ordered by")
        unsorted, made = self._part, self._temporary()
        unsorted.flush()
        try:
            with unsorted.path.open("rb", buffering=0) as file:
                frames = read_frames(file, unsorted.path)
                entries = Picker(entry for frame in frames for entry in frame.entries)
                for key in order:
                    made.append(entries.take(key))
        except FileNotFoundError:
            made.close()
            raise LostLease(f"{self._name}: removed by another writer") from None
        except BaseException:
            made.close()
            raise
        self._part = made
        unsorted.close()

    def _resume(self, predecessor: Path) -> Part:
        """A part with the whole frames of another; it gets its name when it has them all."""
        part = self._temporary()
        try:
            for frame, data in whole_frames(predecessor):
                part.copy(data, frame.entries)
            part.sync()
            with disk_errors(self._name):
                os.link(part.path, self._name)
            part.path.unlink()
            part.path = self._name
        except BaseException:
            part.close()
            raise
        return part

    def _temporary(self) -> Part:
        path = self._name.with_name(self._name.name + ".tmp")
        path.unlink(missing_ok=True)
        return self._new(path)

    def _new(self, path: Path) -> Part:
        return Part(path, self._limits, self._counted)


def write_groups(
    directory: Path,
    groups: Iterable[tuple[str, list[Row]]],
    per_shard: int = 256,
    limits: Limits | None = None,
) -> int:
    """Writes a job's shards, in place of any older ones.

    No shard is complete before the last one is written.

    Args:
        directory: The folder of the stage's shards.
        groups: Keys with their rows; each key once.
        per_shard: Keys in a shard.
        limits: When a frame is closed.

    Returns:
        The number of shards.

    Raises:
        UserError: A key comes twice, or the folder cannot be written.
    """
    clear(make_folder(directory))
    keys = set[str]()
    written: list[tuple[Path, Sidecar]] = []
    writer: ShardWriter | None = None
    try:
        for key, rows in groups:
            if key in keys:
                raise UserError(f"{directory}: key {key!r} comes twice; keys must be unique")
            if writer is not None and len(writer.done) >= per_shard:
                written.append((writer.path, writer._publish(None)))
                writer.abandon()
                writer = None
            keys.add(key)
            writer = writer or ShardWriter(directory, len(written), limits=limits)
            writer.add(key, rows)
        if writer is not None:
            written.append((writer.path, writer._publish(None)))
    finally:
        if writer is not None:
            writer.abandon()
    sync_folder(directory)
    for index, (path, sidecar) in enumerate(written):
        write_sidecar(path, sidecar, sync_names=False)
        remove_parts(directory, index, 0)
    sync_folder(directory)
    return len(written)


def adopt(
    directory: Path, index: int, source: Sidecar, generation: int, counted: Sequence[str] = ()
) -> Sidecar | None:
    """Looks after a shard whose writer died between its link and its sidecar.

    Only for who holds the shard's lease.

    Args:
        directory: The folder of the stage's shards.
        index: The shard's number.
        source: The sidecar of the input shard, whose keys it must hold.
        generation: Of the lease held.
        counted: As for `ShardWriter`.

    Returns:
        The sidecar it has now; None where there was no such shard, or a damaged one, which
        has become a part to resume from.
    """
    path = shard_path(directory, index)
    if not path.exists():
        return None
    sidecar = inspect(path, generation, counted)
    if sidecar is not None and sidecar.keys == source.keys:
        write_sidecar(path, sidecar)
        remove_parts(directory, index, generation)
        return sidecar
    if any(part_path(directory, index, older).exists() for older in range(generation)):
        path.unlink()
    else:
        path.replace(part_path(directory, index, max(generation - 1, 0)))
    return None


@dataclass(frozen=True)
class Repair:
    """What became of a damaged shard.

    Attributes:
        path: The shard.
        damaged: Whether it was; if not, nothing was touched.
        kept: Number of keys saved.
        lost: Keys known to be lost, sorted.
        unnamed: Further lost keys of which only the number is known.
        aside: Where the damaged file is now, if there was one.
    """

    path: Path
    damaged: bool
    kept: int
    lost: list[str]
    unnamed: int = 0
    aside: Path | None = None


def repair(path: Path, source: Path | None = None) -> Repair:
    """Takes a damaged shard apart: the whole frames become a part, to be resumed from.

    The shard is no longer complete afterwards; its stage, run again, makes what was lost.
    Not for shards that somebody works on.

    Args:
        path: The shard.
        source: The input shard it was made from; with it every lost key can be named.

    Raises:
        UserError: There is neither a shard nor a sidecar, or the folder cannot be written.
    """
    try:
        return Repair(path, damaged=False, kept=verify(path).inputs, lost=[])
    except ShardError:
        expected = _expected(path)
    if not path.exists() and not sidecar_path(path).exists():
        raise UserError(f"{path}: there is no such shard; name an existing one")
    kept, aside = set[str](), None
    if path.exists():
        index = int(path.name.removesuffix(SUFFIX))
        generation = list_folder(path.parent).floor(index)
        writer = ShardWriter(path.parent, index, generation, resume=path)
        writer.abandon()
        kept, aside = writer.done, _aside(path)
        named = marked_keys(path)
    else:
        named = set()
    if source is not None:
        with suppress(ShardError):  # The input may be damaged, too.
            named |= {entry.key for entry in read_entries(source)}
    with disk_errors(path):
        sidecar_path(path).unlink(missing_ok=True)
        if aside is not None:
            path.rename(aside)
    lost = sorted(named - kept)
    unnamed = max(expected - len(kept) - len(lost), 0)
    return Repair(path, True, len(kept), lost, unnamed, aside)


def _expected(path: Path) -> int:
    """How many keys the sidecar promises; 0 if it cannot be read."""
    try:
        return read_sidecar(path).inputs
    except ShardError:
        return 0


def _aside(path: Path) -> Path:
    """A free name for a damaged shard."""
    names = (path.with_name(f"{path.name}.damaged{count or ''}") for count in range(10_000))
    return next(name for name in names if not name.exists())
