"""A file of frames in the making."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.disk import disk_errors, write_all
from hpc.frames import Entry, add_up, encode_frame
from hpc.sidecars import Sidecar, keys_digest


@dataclass(frozen=True)
class Limits:
    """When a frame is closed, whichever comes first.

    Attributes:
        keys: Keys in it: enough to compress well, few enough to lose at a crash.
        bytes: Bytes of its rows before compression; what a reader holds in memory.
        seconds: Age of its oldest row: what a crash may cost. With what it takes to notice and to
            write, that stays below a minute.
    """

    keys: int = 64
    bytes: int = 4 << 20
    seconds: float = 50.0


class Part:
    """A file of frames in the making.

    Args:
        path: Its name; must not exist.
        limits: When a frame is closed.
        counted: Fields of its rows to sum up.

    Attributes:
        keys: Its keys, in the order they came.
        rows: How many rows it holds.
        errors: How many of its keys failed.
        even: Whether its frames were closed by keys and bytes alone, as any writer would.
        sums: What the counted fields come to.
    """

    def __init__(self, path: Path, limits: Limits, counted: Sequence[str] = ()) -> None:
        self.sums = dict.fromkeys(counted, 0)
        self.path, self.keys, self.rows, self.errors = path, list[str](), 0, 0
        self.even = True
        """Whether its frames were closed by keys and bytes alone, as any writer would."""
        self._limits, self._pending, self._pending_bytes = limits, list[Entry](), 0
        self._since, self._short = 0.0, False
        self._size, self._hasher = 0, hashlib.sha256()
        with disk_errors(path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            self._descriptor = os.open(path, flags, 0o666)

    def append(self, entry: Entry) -> None:
        """Takes a key's outcome; closes the frame when that fills it."""
        if not self._pending:
            self._since = time.monotonic()
            self.even = self.even and not self._short
        self._pending.append(entry)
        self._pending_bytes += sum(map(len, entry.rows))
        self._count(entry)
        full = len(self._pending) >= self._limits.keys
        if full or self._pending_bytes >= self._limits.bytes:
            self._close_frame()

    def age(self) -> float:
        """Seconds the oldest entry has waited for its frame to be closed."""
        return time.monotonic() - self._since if self._pending else 0.0

    def flush(self) -> None:
        """Closes the frame, however short."""
        if self._pending:
            self._short = True
            self._close_frame()

    def finish(self) -> None:
        """Closes the last frame and makes all durable. A file without keys gets one empty frame."""
        self.flush()
        if not self._size:
            self._close_frame()
        self.sync()

    def copy(self, frame: bytes, entries: Sequence[Entry]) -> None:
        """Takes over a whole frame as it is."""
        self._write(frame)
        self.even = False
        for entry in entries:
            self._count(entry)

    def sync(self) -> None:
        """Makes what is written durable."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)

    def ours(self) -> bool:
        """Whether the file still stands under its name."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            return False

    def close(self) -> None:
        """Closes the file; what has no whole frame is lost."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def sidecar(self, generation: int) -> Sidecar:
        """What the file holds so far."""
        return Sidecar(
            rows=self.rows,
            inputs=len(self.keys),
            errors=self.errors,
            bytes=self._size,
            sha256=self._hasher.hexdigest(),
            keys=keys_digest(self.keys),
            generation=generation,
            sums=self.sums,
        )

    def _count(self, entry: Entry) -> None:
        self.keys.append(entry.key)
        self.rows += len(entry.rows)
        self.errors += bool(entry.error)
        add_up(self.sums, entry)

    def _close_frame(self) -> None:
        self._write(encode_frame(self._pending))
        self._pending, self._pending_bytes = [], 0

    def _write(self, data: bytes) -> None:
        with disk_errors(self.path):
            try:
                write_all(self._descriptor, data)
            except OSError:
                # What is whole stays whole, and the frame can be tried again.
                os.ftruncate(self._descriptor, self._size)
                os.lseek(self._descriptor, self._size, os.SEEK_SET)
                raise
        self._size += len(data)
        self._hasher.update(data)
