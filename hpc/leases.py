"""Leases on shards: files that say who works on what, fenced by generation.

A lease is a file ``NNNNN.<generation>``, made by exclusive create. Its owner rewrites a
counter in it; an observer that sees the same bytes for longer than the time to live, on
its own monotonic clock, takes the shard over under the next generation. Clocks of
different nodes are never compared. A lease only spares work: what keeps a paused owner
from doing harm is the exclusive link at a shard's commit.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpc.disk import disk_errors, make_folder

_NAME = re.compile(r"(\d{5,})\.(\d+)")


class LostLease(Exception):
    """Somebody else has taken the shard over, or finished it."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    Attributes:
        token: Unique to this owner.
        host: Its node's name, for people.
        place: The running kernel and its process namespace, in which ``pid`` has a meaning;
            empty where that cannot be told.
        pid: Its process.
        started: When that process started, in its kernel's ticks since boot.
        job: Its batch job's id, if any.
    """

    token: str
    host: str
    place: str
    pid: int
    started: int
    job: str = ""

    @classmethod
    def here(cls, job: str = "") -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), _place(), pid, _started(pid) or 0, job)


def gone(owner: Owner) -> bool:
    """Whether an owner on this very kernel is known to be dead; False where it cannot be told."""
    if not owner.place or owner.place != _place():
        return False
    return _started(owner.pid) != owner.started


class Lease:
    """A lease this process holds. Made by `Leases.claim`; safe to beat from a thread."""

    def __init__(self, directory: Path, index: int, generation: int, owner: Owner) -> None:
        """Creates the lease's file.

        Raises:
            FileExistsError: Another owner has this generation.
            UserError: The folder cannot be written.
        """
        self.index, self.generation = index, generation
        self.path = lease_path(directory, index, generation)
        self._owner, self._beats = owner, 0
        with disk_errors(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            self._descriptor: int = os.open(self.path, flags, 0o666)
        try:
            # Unsynced: what excludes others is the name; beats make the owner known.
            self._write(sync=False)
        except BaseException:
            self.path.unlink()
            self.close()
            raise

    def beat(self) -> None:
        """Tells observers that the owner lives.

        Raises:
            LostLease: The lease was taken over.
        """
        self.check()
        self._beats += 1
        self._write()

    def check(self) -> None:
        """Looks whether the lease is still this owner's.

        Raises:
            LostLease: It was taken over, or its shard is done.
        """
        successor = lease_path(self.path.parent, self.index, self.generation + 1)
        try:
            ours = os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            ours = False
        if not ours or successor.exists():
            raise LostLease(f"shard {self.index}: lease {self.path.name} was taken over")

    def release(self) -> None:
        """Leaves the shard to whoever comes next, at once. Harmless on a lost lease."""
        try:
            self._write(released=True)
        except OSError:
            pass  # It runs out by itself.
        finally:
            self.close()

    def drop(self) -> None:
        """Removes the lease and its predecessors: the shard is done."""
        self.close()
        for generation in range(self.generation, -1, -1):
            lease_path(self.path.parent, self.index, generation).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file without a word to the others."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, released: bool = False, sync: bool = True) -> None:
        state = {"beat": self._beats, "released": released, "owner": asdict(self._owner)}
        with disk_errors(self.path):
            # In place, to the open file: a lease that was removed cannot come back to life.
            os.pwrite(self._descriptor, json.dumps(state).ljust(511).encode() + b"\n", 0)
            if sync:
                os.fsync(self._descriptor)


@dataclass
class Leases:
    """All leases of a stage, as one observer sees them.

    Attributes:
        directory: Their folder.
        owner: In whose name leases are taken.
        ttl: Seconds a counter may stand still. A heartbeat is due at least four times in it;
            60 s outlives the attribute caches of network file systems.
        dead: Whether an owner is known to be gone, so that its leases are free at once.
            By default asks this node's kernel; a cluster can ask its scheduler as well.
        clock: A monotonic clock in seconds.
    """

    directory: Path
    owner: Owner = field(default_factory=Owner.here)
    ttl: float = 60.0
    dead: Callable[[Owner], bool] = gone
    clock: Callable[[], float] = time.monotonic
    # Of each held lease: what it said, since when, and whether it ever said something else.
    _seen: dict[tuple[int, int], tuple[bytes, float, bool]] = field(
        default_factory=dict, repr=False
    )

    def __post_init__(self) -> None:
        """Makes the folder."""
        make_folder(self.directory)

    def claim(
        self,
        shards: Mapping[int, int],
        finished: Callable[[int], bool] = lambda index: False,
        takeover: bool = True,
    ) -> Lease | None:
        """Takes one of the shards that nobody holds.

        Costs one or two listings of the folder, which has no names but those of shards at work,
        and the reading of held leases only when nothing is free. Tries them in random order,
        so that many workers seldom collide.

        Args:
            shards: Index of each unfinished shard to the lowest generation allowed for it
                (above that of any part left in its folder).
            finished: Asked about a shard that seems free: whether it was finished since
                ``shards`` was put together. Such a one is passed over.
            takeover: Whether to look for owners that are gone where nothing is free. Without it
                the folder is not listed beforehand: what is held does not let itself be taken.

        Returns:
            The lease, or None when all are held.
        """
        held = self.held() if takeover else {}
        for index in _shuffled(index for index in shards if index not in held):
            if not finished(index) and (lease := self._take(index, shards[index])):
                return lease
        if not takeover:
            return None
        for index in _shuffled(index for index in held if index in shards):
            if not self._stale(index, held[index]):
                continue
            if lease := self._take(index, max(held[index] + 1, shards[index])):
                lease_path(self.directory, index, held[index]).unlink(missing_ok=True)
                return lease
        self._seen = {seen: value for seen, value in self._seen.items() if seen[0] in shards}
        return None

    def living(self, shards: Iterable[int]) -> bool:
        """Whether each of these shards is held by an owner that was just seen to beat.

        By what the last `claim` saw: none of them will be free soon.
        """
        now = self.clock()
        beating = {
            index
            for (index, _), (_, since, beats) in self._seen.items()
            if beats and now - since < self.ttl / 2
        }
        return beating.issuperset(shards)

    def held(self) -> dict[int, int]:
        """Every index that has a lease, to its highest generation; one listing of the folder."""
        held: dict[int, int] = {}
        for path in self.directory.iterdir():
            if match := _NAME.fullmatch(path.name):
                index, generation = int(match[1]), int(match[2])
                held[index] = max(generation, held.get(index, generation))
        return held

    def owners(self) -> dict[int, Owner]:
        """Who holds which shard now, as far as their files tell."""
        found = {}
        for index, generation in self.held().items():
            state = _parse(_read(lease_path(self.directory, index, generation)))
            if state is not None and not state[1]:
                found[index] = state[0]
        return found

    def clear(self) -> None:
        """Removes every lease of a complete stage: those of owners killed after their commit."""
        for index, generation in self.held().items():
            lease_path(self.directory, index, generation).unlink(missing_ok=True)

    def _take(self, index: int, generation: int) -> Lease | None:
        try:
            lease = Lease(self.directory, index, generation, self.owner)
        except FileExistsError:
            return None
        # The decision may rest on an old look at the folder: a later generation rules.
        if self.held().get(index) != generation:
            lease.close()
            lease.path.unlink(missing_ok=True)
            return None
        return lease

    def _stale(self, index: int, generation: int) -> bool:
        content = _read(lease_path(self.directory, index, generation))
        if content is None:
            return False
        now = self.clock()
        before, since, _ = self._seen.get((index, generation), (None, now, False))
        if content != before:
            self._seen[index, generation] = (content, now, before is not None)
            since = now
        state = _parse(content)
        if state is not None and (state[1] or self.dead(state[0])):
            return True
        return now - since >= self.ttl


def _shuffled(indices: Iterable[int]) -> list[int]:
    found = list(indices)
    random.shuffle(found)
    return found


def lease_path(directory: Path, index: int, generation: int) -> Path:
    """Where a lease's file is."""
    return directory / f"{index:05d}.{generation}"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None  # Gone, or in the middle of a takeover: look again later.


def _parse(content: bytes | None) -> tuple[Owner, bool] | None:
    """The owner and whether it released; None while the file is half written."""
    try:
        state = json.loads(content or b"")
        return Owner(**state["owner"]), bool(state["released"])
    except (ValueError, KeyError, TypeError):
        return None


def _place() -> str:
    """This running kernel and process namespace: where process ids can be compared.

    Host names do not do: containers share them, and a node that started anew keeps its own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process started, in ticks since boot; None for a dead one, zombies included."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # The name before may hold anything.
    return None if fields[0] in "ZX" else int(fields[19])
