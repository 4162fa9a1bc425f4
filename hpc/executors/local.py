"""Jobs as processes of this machine."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.disk import make_folder
from hpc.executors.base import Job, State
from hpc.executors.zygote import follow_parent, reap, signal_group

_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class _Process:
    log: Path
    pid: int | None = None
    status: int | None = None
    request: int | None = None  # its number at the zygote, where that started it


class LocalExecutor:
    """Runs jobs as processes, each in its own session, with its own log.

    When the executor's process dies, its jobs get SIGTERM from the kernel (Linux).

    Args:
        preload: Modules to import once in a process that then forks the jobs; without any,
            each job is a program of its own. A job behaves the same either way.
        threads: Threads of the libraries that count cores when the preloaded modules are
            imported.
    """

    def __init__(self, preload: Sequence[str] = (), threads: int = 1) -> None:
        self.preload = tuple(preload)
        self.threads = threads
        self.keep: tuple[int, ...] = ()
        self._jobs: dict[str, list[_Process]] = {}
        self._forked: dict[int, _Process] = {}
        self._numbers = itertools.count()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._pending = b""

    def submit(self, job: Job) -> str:
        """Starts the job's processes; their logs are ``a<attempt>-<n>.log``."""
        make_folder(job.logs)
        handle = str(next(self._numbers))
        environment = dict(os.environ) | dict.fromkeys(_THREADS, str(job.threads)) | dict(job.env)
        self._jobs[handle] = []
        for _ in range(job.count):
            process = _Process(_free_log(job.logs, job.attempt))
            self._jobs[handle].append(process)
            if self.preload and self._ready():
                self._fork(process, job.command, environment)
            else:
                self._start(process, job.command, environment)
        return handle

    def state(self, handle: str) -> State:
        """Statuses of the ended and ids of the running; never waits."""
        self._listen()
        processes = self._jobs[handle]
        for process in processes:
            if process.status is None and process.request is None and process.pid is not None:
                process.status = reap(process.pid)
        running = [process for process in processes if process.status is None]
        return State(
            running=len(running),
            ended=tuple((p.status, p.log) for p in processes if p.status is not None),
            processes=tuple(p.pid for p in processes if p.pid is not None),
        )

    def cancel(self, handle: str, kill: bool = False) -> None:
        """SIGTERM (or SIGKILL) to the group of every process that still runs."""
        number = signal.SIGKILL if kill else signal.SIGTERM
        self.state(handle)
        for process in self._jobs[handle]:
            if process.status is not None:
                continue
            # Each side signals the children it has yet to reap: their ids are still theirs.
            if process.request is not None:
                self._send({"id": process.request, "signal": int(number)})
            elif process.pid is not None:
                signal_group(process.pid, number)

    def close(self) -> None:
        """Kills what still runs and ends the preloaded process."""
        for handle in self._jobs:
            self.cancel(handle, kill=True)
        if self._zygote is not None:
            if self._control is not None:
                # It handles what was sent before, then leaves.
                self._control.shutdown(socket.SHUT_WR)
            try:
                self._zygote.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
            self._listen()
            self._zygote = None
        for handle in self._jobs:
            while self.state(handle).running:
                time.sleep(0.01)

    # ---- programs of their own

    def _start(
        self, process: _Process, command: Sequence[str], environment: dict[str, str]
    ) -> None:
        parent = os.getpid()
        with process.log.open("ab") as log:
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                    pass_fds=self.keep,
                    preexec_fn=lambda: follow_parent(parent),
                )
            except OSError as error:
                log.write(f"{command[0]}: {error.strerror}\n".encode())
                process.status = 127
                return
        process.pid = child.pid
        # From here on `reap` waits for it; Popen must not.
        child.returncode = 0

    # ---- children of the zygote

    def _ready(self) -> bool:
        """Whether the preloaded process is there, started now if need be."""
        if self._zygote is None:
            ours, theirs = socket.socketpair()
            environment = dict(os.environ) | dict.fromkeys(_THREADS, str(self.threads))
            name = "hpc.executors.zygote"
            self._zygote = subprocess.Popen(
                [sys.executable, "-m", name, str(theirs.fileno()), *self.preload],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                pass_fds=(theirs.fileno(), *self.keep),
            )
            theirs.close()
            self._control = ours
        return self._control is not None

    def _fork(self, process: _Process, command: Sequence[str], environment: dict[str, str]) -> None:
        number = next(self._numbers)
        self._forked[number] = process
        process.request = number
        request = {"id": number, "command": list(command), "env": environment}
        self._send({**request, "log": str(process.log)})

    def _send(self, request: dict[str, Any]) -> None:
        if self._control is None:
            return
        try:
            self._control.setblocking(True)
            self._control.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            self._lost()

    def _listen(self) -> None:
        """Takes in what the zygote has reported."""
        if self._control is None:
            return
        self._control.setblocking(False)
        while True:
            try:
                received = self._control.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                received = b""
            if not received:
                self._lost()
                return
            *lines, self._pending = (self._pending + received).split(b"\n")
            for line in lines:
                self._take(json.loads(line))

    def _take(self, report: dict[str, Any]) -> None:
        if "status" in report:
            self._forked.pop(report["id"]).status = report["status"]
        else:
            self._forked[report["id"]].pid = report["pid"]

    def _lost(self) -> None:
        """The zygote died: its children are told by the kernel; later jobs start by themselves.

        If it died because a module cannot be imported, the next attempt's log says so.
        """
        if self._control is not None:
            self._control.close()
            self._control = None
        for process in self._forked.values():
            if process.pid is not None:
                signal_group(process.pid, signal.SIGKILL)
            process.status = -signal.SIGKILL
        self._forked.clear()


def _free_log(folder: Path, attempt: int) -> Path:
    """Claims the next log name of an attempt."""
    for number in itertools.count():
        path = folder / f"a{attempt}-{number}.log"
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError("unreachable")
