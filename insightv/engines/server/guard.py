"""Stands between a worker and a server it started, so that nothing is ever left running.

``python -I guard.py GRACE FOLDER COMMAND…`` starts the command and ends it, with all it has
started, when its own standard input is closed (the worker has left or was killed) or when it
is told to by SIGTERM. Then the folder, which holds the key and the caches, is removed. A log
that grows too long loses its middle. Runs on its own, in any Python: nothing of the package is
imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_SUBREAPER, _DEATH_SIGNAL = 36, 1
_TICK = 0.1
_LOOK = 10.0
"""Seconds between looks at the log: each is a question to a file system that many share."""
_MOST_BYTES, _KEPT_BYTES = 256 * 2**20, 16 * 2**20


def main() -> int:
    """Runs the command; returns its status as a shell gives it, 128 + number for signals."""
    parent, grace, folder, words = os.getppid(), float(sys.argv[1]), sys.argv[2], sys.argv[3:]
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    # What the server's processes leave behind becomes a child of this one, and is found.
    prctl(_SUBREAPER, 1)
    status = 127
    try:
        server = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: prctl(_DEATH_SIGNAL, signal.SIGKILL),
        )
        looked = time.monotonic()
        while server.poll() is None and not asked and os.getppid() == parent:
            if time.monotonic() - looked > _LOOK:
                looked = time.monotonic()
                trim()
            if select.select([0], [], [], _TICK)[0] and not os.read(0, 4096):
                break
        if server.poll() is None:
            end(server, grace)
        status = server.returncode
    except OSError as error:
        print(f"{words[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        kill_children()
        shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


def end(server: subprocess.Popen[bytes], grace: float) -> None:
    """Asks a server's group to end, and waits so many seconds before it is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    until = time.monotonic() + grace
    while server.poll() is None and time.monotonic() < until:
        time.sleep(_TICK)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def trim(most: int = _MOST_BYTES, kept: int = _KEPT_BYTES) -> None:
    """Cuts the middle out of the log, standard output, when it is longer than ``most`` bytes.

    All who write there append, so the server goes on behind what is kept.
    """
    with contextlib.suppress(OSError):
        size = os.fstat(1).st_size
        if size > most:
            tail = os.pread(1, kept, size - kept)
            os.ftruncate(1, kept)
            os.write(1, b"\n[... %d bytes cut out ...]\n" % (size - 2 * kept) + tail)


def kill_children() -> None:
    """Kills the children of this process until there are none, also those they hand over."""
    while True:
        for child in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(_TICK / 2)
        except ChildProcessError:
            return


def children() -> list[int]:
    """The ids of this process' children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            # PID (NAME) STATE PARENT …; a name may hold anything, parentheses included.
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def prctl(option: int, value: int) -> None:
    """Tells the kernel (Linux) something about this process."""
    ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
