"""A process that has imported the heavy modules once and forks one child a job.

Importing the libraries of a payload can take longer than a small stage. The executor starts
``python -m hpc.executors.zygote SOCKET KEEP MODULE…`` and asks it over a socket for children,
which behave like a freshly started ``python -m PROGRAM …``: own session, own environment,
own log, default signals. Nothing but imports may happen before a fork, so that libraries
with threads start theirs in the child.

Requests, one JSON object a line: ``{"id", "command", "env", "log"}``, ``{"id", "signal"}``.
Replies: ``{"id", "pid"}`` and later ``{"id", "status"}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def follow_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Asks the kernel to signal this process when its parent dies (Linux; else nothing).

    Args:
        parent: The parent's id: it may have died before the kernel was asked.
        number: The signal.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def reap(process: int) -> int | None:
    """The exit status of a child that ended (negative: a signal), or None while it runs.

    Whatever it left behind in its session's process group is ended first, while the child's
    id is still its own.
    """
    try:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        signal_group(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    except ChildProcessError:
        return -signal.SIGKILL


def signal_group(process: int, number: int) -> None:
    """Signals a session's leader and all of its group, if it is still there."""
    try:
        os.killpg(process, number)
    except ProcessLookupError:
        # Just forked, it may not have made its session yet.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
    except PermissionError:
        pass


def main() -> None:
    """Serves requests until the executor hangs up; in a child, runs the program."""
    control = socket.socket(fileno=int(sys.argv[1]))
    follow_parent(os.getppid())
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    request = _serve(control)
    if request is not None:
        # Unwinding out of here ends the child as any program ends: exit status, traceback,
        # atexit, buffers.
        _run(request["command"])


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Returns a request in the child that is to run it, None in the parent at the end."""
    waker, woken = os.pipe()
    for end in (waker, woken):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    children: dict[int, int] = {}
    pending = b""
    while True:
        ready, _, _ = select.select([control.fileno(), waker], [], [], 1.0)
        if waker in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(waker, 4096)
        for number, process in list(children.items()):
            status = reap(process)
            if status is not None:
                del children[number]
                _reply(control, id=number, status=status)
        if control.fileno() not in ready:
            continue
        received = control.recv(65536)
        if not received:
            for process in children.values():
                signal_group(process, signal.SIGTERM)
            return None
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            number = request["id"]
            if "signal" in request:
                if number in children:
                    signal_group(children[number], request["signal"])
                continue
            process = _fork(request)
            if process == 0:
                signal.set_wakeup_fd(-1)
                for descriptor in (waker, woken):
                    os.close(descriptor)
                control.close()
                return dict(request)
            children[number] = process
            _reply(control, id=number, pid=process)


def _fork(request: dict[str, Any]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    process = os.fork()
    if process:
        return process
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["env"])
    follow_parent(parent)
    return 0


def _reply(control: socket.socket, **reply: Any) -> None:
    with contextlib.suppress(OSError):
        control.sendall(json.dumps(reply).encode() + b"\n")


def _run(command: list[str]) -> None:
    """Runs ``python -m MODULE …``, ``python SCRIPT …`` or a console script in this process."""
    program, *words = command
    if not Path(program).name.startswith("python"):
        words = command
        with Path(program).open("rb") as file:
            if b"python" not in file.readline(200):
                os.execvp(program, command)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0].startswith("-"):
        os.execvp(program, command)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
