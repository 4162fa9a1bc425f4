"""A lock on a run directory, held by its driver and the workers that driver started.

The kernel lets go of the lock when its last holder dies, so no stale lock is ever left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc.errors import UserError


@contextmanager
def hold(path: Path, patience: float = 60.0) -> Iterator[int]:
    """Holds a lock file.

    Workers inherit the descriptor: after a driver was killed, the next one waits until they
    have left.

    Args:
        path: The lock's file, in the run directory.
        patience: Seconds to wait for the workers of a dead driver.

    Yields:
        The descriptor, for children to inherit.

    Raises:
        UserError: Another driver is at work, or the workers of a dead one do not leave.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    held = False
    try:
        give_up = time.monotonic() + patience
        while not (held := _try_lock(descriptor, path)):
            holder = _holder(descriptor)
            if holder and (holder[0] != socket.gethostname() or _alive(holder[1])):
                raise UserError(
                    f"{path.parent}: process {holder[1]} on {holder[0]} is at work there already; "
                    "wait for it, or end it first"
                )
            if time.monotonic() > give_up:
                raise UserError(
                    f"{path.parent}: workers of an earlier run are still at work; "
                    "wait for them, or end them (their ids stand in jobs.jsonl)"
                )
            time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        if held:
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def locked(path: Path) -> bool:
    """Whether anybody holds a lock file now."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, path)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise UserError(
            f"{path.parent}: the file system holds no locks ({error.strerror}); "
            "put the run directory on one that does"
        ) from None
    return True


def _holder(descriptor: int) -> tuple[str, int] | None:
    """Host and process id of the driver that signed the lock."""
    words = os.pread(descriptor, 4096, 0).decode(errors="replace").split()
    return (words[0], int(words[1])) if len(words) == 2 and words[1].isdigit() else None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
