"""A server of one's own: started, waited for, watched, started again, ended."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hpc.errors import UserError
from insightv.engines.server.client import Client, Garbled, Late, Unreachable, excerpt
from insightv.engines.server.programs import HOST, Place, variables, words

if TYPE_CHECKING:
    from insightv.engines.config import EngineConfig

_GUARD = Path(__file__).with_name("guard.py")
_GRACE = 4.0
"""Seconds between asking a server to end and killing it; a worker has ten for everything."""
_PORTS = 5
"""Ports that are tried when others take them first."""
_TICK = 0.2
_PROBE = 5.0
_TELL = 30.0
_TOLD_LINES, _TAIL = 3, 8192

log = logging.getLogger(__name__)
_numbers = count()


class ServerGone(RuntimeError):
    """A server is gone for good; what was asked of it is to be done again elsewhere."""


class _Ended(Exception):
    """The server ended before it answered."""


class OwnServer:
    """One server beside this worker.

    Attributes:
        address: Where it listens; another one after each start.
        key: What it asks for; likewise.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Path,
        name: str,
        logs: Path | None,
        gpus: tuple[str, ...] = (),
        share: float = 1.0,
    ):
        """Nothing is started yet.

        Args:
            config: Of the engine.
            model: The model's folder.
            name: What requests call it.
            logs: Folder for what the server says; none: it is not kept.
            gpus: Those it may use.
            share: Its part of their memory.
        """
        self._config, self._server = config, config.server
        self._model, self._name, self._gpus, self._share = model, name, gpus, share
        self.address = self.key = ""
        self._logs = logs
        self._log: Path | None = None
        self._out: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._up: asyncio.Future[None] | None = None

    async def ready(self, client: Client) -> None:
        """Returns when it answers; starts it at the first call.

        Raises:
            UserError: It never answered.
            ServerGone: It died too often.
        """
        if self._keeper is None:
            loop = asyncio.get_running_loop()
            self._up = loop.create_future()
            self._keeper = loop.create_task(self._keep(client))
        assert self._up is not None
        await asyncio.shield(self._up)

    @property
    def running(self) -> bool:
        """Whether it has answered, and nobody has ended it since."""
        return self._up is not None and self._up.done()

    def kill(self) -> None:
        """Ends a server that hangs; its keeper starts another one."""
        if self._process is not None and self.running:
            self._up = asyncio.get_running_loop().create_future()
            self._hang_up(self._process)

    async def close(self) -> None:
        """Ends it, with everything it has started."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._keeper
        if self._process is not None:
            await asyncio.to_thread(self._end, self._process)
        if self._out is not None:
            self._out.close()

    # ---- the keeper

    async def _keep(self, client: Client) -> None:
        """Keeps a server running until that is hopeless."""
        assert self._up is not None
        try:
            await self._begin(client)
            left = self._server.restarts
            while True:
                self._up.set_result(None)
                status = await self._ending()
                if self._up.done():
                    self._up = asyncio.get_running_loop().create_future()
                left = await self._begin_again(client, status, left)
        except Exception as error:
            self._up.set_exception(error)
            self._up.exception()  # Seen: nobody may be waiting.

    async def _begin_again(self, client: Client, status: int, left: int) -> int:
        """Starts it once more, or more often; returns how often it may still be.

        Raises:
            ServerGone: It has been started too often.
        """
        while left:
            left -= 1
            log.warning(
                "the server ended with %s and is started again (%d more starts): %s",
                *(_ending(status), left, self._last_words()),
            )
            with suppress(UserError):
                await self._begin(client)
                return left
        raise ServerGone(f"the server died {self._server.restarts + 1} times, {self._told()}")

    async def _begin(self, client: Client) -> None:
        """Starts a server and waits until it answers.

        Raises:
            UserError: It did not.
        """
        for _ in range(_PORTS):
            port = free_port()
            process = self._process = self._spawn(port)
            try:
                await self._wait(client, process, port)
                return
            except _Ended:
                if _free(port):
                    status = _ending(process.returncode)
                    raise UserError(
                        f"the server ended with {status} before it answered, {self._told()}"
                    ) from None
        raise UserError(f"{_PORTS} free ports were taken by others before the server had one")

    def _spawn(self, port: int) -> subprocess.Popen[bytes]:
        self.key = secrets.token_urlsafe(32)
        self.address = f"http://{HOST}:{port}"
        folder = Path(tempfile.mkdtemp(prefix="insightv-server-"))  # for its owner alone
        place = Place(self._model, self._name, port, self.key, folder, self._gpus, self._share)
        try:
            command = words(self._config, place)
            env = variables(self._config, place)
            guard = [sys.executable, "-I", str(_GUARD), str(_GRACE), str(folder)]
            out = self._out = self._out or self._open_log()
            out.write(f"$ {shlex.join(command)}\n".encode())
            return subprocess.Popen(
                guard + command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=folder,
                start_new_session=True,
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _open_log(self) -> IO[bytes]:
        if self._logs is None:
            return tempfile.TemporaryFile("a+b", buffering=0)
        self._logs.mkdir(parents=True, exist_ok=True)
        name = f"server-{socket.gethostname()}-{os.getpid()}-{next(_numbers)}.log"
        self._log = self._logs / name
        return self._log.open("a+b", buffering=0)

    async def _wait(self, client: Client, process: subprocess.Popen[bytes], port: int) -> None:
        """Waits until the server answers, telling now and then how long it has taken.

        Raises:
            _Ended: It ended.
            UserError: It took too long.
        """
        started = told = time.monotonic()
        while process.poll() is None:
            if await answers(client, self.address) and _is_ours(port):
                return
            now = time.monotonic()
            if now - started > self._server.start:
                await asyncio.to_thread(self._end, process)
                raise UserError(
                    f"the server did not answer within {self._server.start:g} s, {self._told()}; "
                    "look there, or give engine.server.start more seconds"
                )
            if now - told >= _TELL:
                told = now
                log.warning(
                    "the server has been loading for %.0f s: %s", now - started, self._last_words()
                )
            await asyncio.sleep(_TICK)
        raise _Ended

    async def _ending(self) -> int:
        """Waits until the server ends; its status."""
        process = self._process
        assert process is not None
        while (status := process.poll()) is None:
            await asyncio.sleep(_TICK)
        return status

    # ---- ending, telling

    def _hang_up(self, process: subprocess.Popen[bytes]) -> None:
        """Lets the guard end the server."""
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Lets the guard end the server, and waits until it has; one that is slow goes on alone."""
        self._hang_up(process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2 * _GRACE)

    def _last_words(self) -> str:
        """The last lines of its log, shortened and escaped."""
        if self._out is None:
            return "nothing"
        number = self._out.fileno()
        # Read in place: the server goes on writing where this handle stands.
        tail = os.pread(number, _TAIL, max(0, os.fstat(number).st_size - _TAIL))
        lines = tail.decode(errors="replace").splitlines()
        said = [line for line in lines if line.strip()][-_TOLD_LINES:]
        return " | ".join(excerpt(line) for line in said)

    def _told(self) -> str:
        kept = f"; its log: {self._log}" if self._log is not None else ""
        return f"and said last: {self._last_words()}{kept}"


async def answers(client: Client, address: str) -> bool:
    """Whether a server says that it is well."""
    try:
        return (await client.ask(f"{address}/health", "", timeout=_PROBE)).status == 200
    except (Unreachable, Late, Garbled):
        return False


def free_port() -> int:
    """A port of the loopback interface that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may linger
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _is_ours(port: int) -> bool:
    """Whether it is this user who listens there: another's server may have come first.

    A line of ``/proc/net/tcp`` holds number, local address:port (hexadecimal), remote, state
    (0A: listening), queues, timer, retransmissions and the user. Where there is none, as on
    other systems than Linux, the answer is yes.
    """
    users = set()
    for name in ("tcp", "tcp6"):
        with suppress(OSError, ValueError, IndexError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                parts = line.split()
                if int(parts[1].rpartition(":")[2], 16) == port and parts[3] == "0A":
                    users.add(int(parts[7]))
    return not users or users == {os.getuid()}


def _ending(status: int) -> str:
    if status <= 128:
        return f"status {status}"
    with suppress(ValueError):
        return signal.Signals(status - 128).name
    return f"status {status}"
