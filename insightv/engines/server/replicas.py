"""One server as the engine sees it: an attempt at a request, and what its failing means."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hpc.errors import RecordError, UserError
from insightv.engines.base import Completion, Request
from insightv.engines.server.client import Client, Garbled, Late, Reply, Unheard, Unreachable
from insightv.engines.server.dialects import read
from insightv.engines.server.process import OwnServer, ServerGone, answers

BUSY = (408, 425, 429, 503)
"""Not now: waited out with patience. Other failures count as tries."""
_BROKEN = 30
"""Failures in a row of requests that had failed before, after which the server is broken."""
_TURN = 0.05
_SECOND_LOOK = 2.0

log = logging.getLogger(__name__)


class Again(Exception):
    """It may work later.

    Attributes:
        patient: The request is not to blame.
        after: Seconds the server asks to be left alone.
        died: The server was well, and died or hung with the request under way.
    """

    def __init__(self, problem: str, patient: bool, after: float = 0.0, died: bool = False):
        super().__init__(problem)
        self.patient, self.after, self.died = patient, after, died


class Replica:
    """One server, as the engine sees it: one that runs, or one of our own.

    Attributes:
        own: The server, if it is started here.
        name: By which requests find it again.
        flying: Requests under way.
        suspects: Requests that are asked alone, or wait for that.
        failed: Failures in a row.
        down: Its address, where it did not answer the last time.
        gone: Why it is asked no more.
    """

    def __init__(self, url: str, key: str, own: OwnServer | None = None):
        """One at ``url``, or one of our own."""
        self._url, self._key, self.own = url, key, own
        self.name = url
        self.flying = self.suspects = self.failed = 0
        self.down = ""
        self.gone: ServerGone | None = None
        self._look: asyncio.Task[bool] | None = None

    @property
    def url(self) -> str:
        """Where it is now."""
        return self.own.address if self.own else self._url

    @property
    def key(self) -> str:
        """What it asks for now."""
        return self.own.key if self.own else self._key

    @asynccontextmanager
    async def flight(self, alone: bool) -> AsyncIterator[None]:
        """The time in which a request is under way: with others, or alone."""
        self.suspects += alone
        try:
            while self.flying if alone else self.suspects:
                await asyncio.sleep(_TURN)
            self.flying += 1
            try:
                yield
            finally:
                self.flying -= 1
        finally:
            self.suspects -= alone

    async def well(self, client: Client, url: str) -> bool:
        """Whether the server at ``url`` says that it is; all that ask at once share one look."""
        if url != self.url:
            return False
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(answers(client, url, self.key))
        return await asyncio.shield(self._look)

    def refuse(self, reply: Reply) -> None:
        """Raises for what no further request can mend.

        Raises:
            UserError: A wrong key, a wrong address.
        """
        if reply.status in (401, 403):
            hint = "" if self.own else "; mend engine.server.key_file"
            raise UserError(f"{self.url} refuses the key ({reply.problem}){hint}")
        if 300 <= reply.status < 400:
            raise UserError(f"{self.url} sends elsewhere, where nothing is sent; mend the url")

    async def attempt(
        self, client: Client, body: bytes, request: Request, alone: bool, failed: bool
    ) -> Completion:
        """One attempt, with others under way or ``alone``; the request may have ``failed`` before.

        Raises:
            Again: It may work later.
            RecordError: Never for this request.
            UserError: Never for any.
            ServerGone: Never again with this server.
        """
        async with self.flight(alone):
            if self.own is not None:
                await self.own.ready(client)
            url = self.url
            if self.down == url and not await self.well(client, url):
                raise Again("it is not well", patient=True)
            self.down = ""
            try:
                reply = await client.ask(f"{url}/v1/chat/completions", self.key, body)
                if reply.status == 200:
                    done = read(reply.json(), request)
                    self.failed = 0
                    return done
            except (Unreachable, Late, Garbled) as error:
                raise await self._failure(client, url, error, failed) from None
            if reply.status >= 500:
                raise await self._failure(client, url, reply, failed)
        if reply.status in BUSY:
            raise Again(reply.problem, True, reply.retry_after)
        own = self.own
        if own is not None and (reply.status in (401, 403) or not own.listens()):
            raise Again(f"another server answers at {url}", patient=True)
        self.refuse(reply)
        if reply.status in (404, 405):
            raise UserError(f"{url}/v1/chat/completions: {reply.problem}; mend engine.server")
        self.failed = 0
        raise RecordError(f"the server refuses the request: {reply.problem}")

    async def _failure(
        self,
        client: Client,
        url: str,
        cause: Unreachable | Late | Garbled | Reply,
        failed: bool,
    ) -> Again:
        """What an attempt without an answer means: is it this request, or is the server dead?

        Raises:
            ServerGone: The server is broken, and not ours to start again.
        """
        told = isinstance(cause, Reply)
        problem = cause.problem if isinstance(cause, Reply) else str(cause)
        alive = isinstance(cause, Garbled) or await self.well(client, url)
        if told and not alive:  # It may only have been too busy to say so.
            await asyncio.sleep(_SECOND_LOOK)
            alive = await self.well(client, url)
        if isinstance(cause, Reply) and cause.status in BUSY and alive:
            return Again(problem, True, cause.retry_after)
        if alive:
            if failed:  # What all that is under way fails at once is over with that once.
                self._note_failure(url)
            return Again(problem, patient=False)
        self.down = url
        if not isinstance(cause, Unreachable):
            self._restart(url, "is not well" if told else "hangs")
        refused = isinstance(cause, Unheard) or (isinstance(cause, Reply) and cause.status in BUSY)
        return Again(problem, patient=True, died=not refused)

    def blame(self, problem: Again) -> str:
        """What a server said that died with one request alone under way."""
        if self.own is None:
            return str(problem)
        self.own.forgive()
        return f"{problem}; it said last: {self.own.last_words()}"

    def _note_failure(self, url: str) -> None:
        """Counts failures in a row: a server that fails at everything is broken.

        Raises:
            ServerGone: It is, and not ours to start again.
        """
        self.failed += 1
        if self.failed >= _BROKEN:
            self.failed = 0
            if self.own is None:
                raise ServerGone(f"{url} fails at everything: {_BROKEN} times in a row")
            self._restart(url, f"has failed {_BROKEN} times in a row")

    def _restart(self, url: str, why: str) -> None:
        """Ends a server of our own, unless that has been done; its keeper starts another."""
        if self.own is not None and self.url == url and self.own.running:
            log.warning("the server at %s %s and is ended", url, why)
            self.own.kill()
