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
_LOWEST, _DRAWS = 16_384, 100
_TICK = 0.2
_PROBE = 30.0
"""Seconds for a server to say that it is well: SGLang generates a token first, for up to 20 s."""
_TAKEN = "address already in use"
_TELL = 30.0
_TOLD_LINES, _TAIL = 3, 8192

log = logging.getLogger(__name__)
_numbers = count()


class ServerGone(RuntimeError):
    """A server is gone for good; what was asked of it is to be done again elsewhere."""


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
        self._answered, self._deaths, self._left = False, 0, self._server.restarts
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

    def forgive(self) -> None:
        """Forgets earlier deaths: it has been found out what the server died of."""
        self._left = self._server.restarts

    def listens(self) -> bool:
        """Whether nobody else has its port."""
        return _is_ours(int(self.address.rpartition(":")[2]))

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
            while True:
                status = await self._live(client)
                self._deaths += 1
                if self._up.done():
                    self._up = asyncio.get_running_loop().create_future()
                if not self._left:
                    raise ServerGone(f"the server died {self._deaths} times, {self._told()}")
                self._left -= 1
                log.warning(
                    "the server ended with %s and is started again (%d more starts): %s",
                    *(_ending(status), self._left, self.last_words()),
                )
        except Exception as error:
            self._up.set_exception(error)
            self._up.exception()  # Seen: nobody may be waiting.

    async def _live(self, client: Client) -> int | None:
        """Starts a server and waits until it has ended; its status, if it has one.

        Raises:
            UserError: It has never answered, and nobody killed it: it would do the same again.
        """
        assert self._up is not None
        try:
            killed = await self._begin(client)
        except UserError:
            if not self._answered:
                raise
            return self._process.poll() if self._process is not None else None
        if killed is not None:
            return killed
        self._answered = True
        self._up.set_result(None)
        return await self._ending()

    async def _begin(self, client: Client) -> int | None:
        """Starts a server and waits until it answers; its status if a signal ended it before.

        Raises:
            UserError: It did not answer.
        """
        for _ in range(_PORTS):
            port = free_port()
            try:
                process = self._process = self._spawn(port)
            except OSError as error:
                raise UserError(
                    f"the server cannot be started: {error}; look at this node's disks and limits, "
                    "or name another folder as TMPDIR"
                ) from error
            status = await self._wait(client, process, port)
            if status is None or _signal(status):
                return status
            if _free(port) and _TAKEN not in self._tail().lower():
                raise UserError(
                    f"the server ended with {_ending(status)} before it answered, {self._told()}"
                )
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

    async def _wait(
        self, client: Client, process: subprocess.Popen[bytes], port: int
    ) -> int | None:
        """Waits until the server answers, telling now and then how long it has taken.

        Returns:
            Its status if it ended instead.

        Raises:
            UserError: It took too long.
        """
        started = told = time.monotonic()
        while (status := process.poll()) is None:
            if _is_ours(port) and await self._greeted(client):
                return None
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
                    "the server has been loading for %.0f s: %s", now - started, self.last_words()
                )
            await asyncio.sleep(_TICK)
        return status

    async def _greeted(self, client: Client) -> bool:
        """Whether a server is well and takes the key: another of this user's would not."""
        if not await answers(client, self.address, self.key):
            return False
        return await _status(client, f"{self.address}/v1/models", self.key) not in (0, 401, 403)

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

    def _tail(self) -> str:
        """The end of its log."""
        if self._out is None:
            return ""
        number = self._out.fileno()
        # Read in place: the server goes on writing where this handle stands.
        tail = os.pread(number, _TAIL, max(0, os.fstat(number).st_size - _TAIL))
        return tail.decode(errors="replace")

    def last_words(self) -> str:
        """The last lines of its log, shortened and escaped."""
        said = [line for line in self._tail().splitlines() if line.strip()][-_TOLD_LINES:]
        return " | ".join(excerpt(line) for line in said) or "nothing"

    def _told(self) -> str:
        kept = f"; its log: {self._log}" if self._log is not None else ""
        return f"and said last: {self.last_words()}{kept}"


async def answers(client: Client, address: str, key: str) -> bool:
    """Whether a server says that it is well; one without a page for that lists its models."""
    status = await _status(client, f"{address}/health", key)
    if status in (404, 405):
        status = await _status(client, f"{address}/v1/models", key)
    return status == 200


async def _status(client: Client, url: str, key: str) -> int:
    """The status of what a page answers; 0: nothing came."""
    try:
        return (await client.ask(url, key, timeout=_PROBE)).status
    except (Unreachable, Late, Garbled):
        return 0


def free_port() -> int:
    """A port of the loopback interface that nobody listens at now.

    A server may load for minutes before it listens, so the port is none of those that the
    kernel gives to outgoing connections, which would take it meanwhile.
    """
    low = 0
    with suppress(OSError, ValueError, IndexError):
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(_DRAWS if low > _LOWEST else 0):
        port = _LOWEST + secrets.randbelow(low - _LOWEST)
        if _free(port):
            return port
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


def _ending(status: int | None) -> str:
    if status is None:
        return "no answer"
    return _signal(status) or f"status {status}"


def _signal(status: int) -> str:
    """The signal that ended a process, by its status; empty if it ended by itself."""
    with suppress(ValueError):
        return signal.Signals(-status if status < 0 else status - 128).name
    return ""
