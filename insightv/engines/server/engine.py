"""The engine behind HTTP: its replicas, which of them is asked, and what is asked again."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

from hpc.errors import RecordError, UserError
from insightv import models
from insightv.engines.base import Completion, Request
from insightv.engines.config import EngineConfig
from insightv.engines.server.chats import Chats
from insightv.engines.server.client import (
    Client,
    Garbled,
    Late,
    Reply,
    Unheard,
    Unreachable,
    excerpt,
)
from insightv.engines.server.config import read_key
from insightv.engines.server.dialects import DIALECTS_TOLD, payload, read
from insightv.engines.server.process import OwnServer, ServerGone, answers
from insightv.engines.server.programs import SLOTS, split_gpus
from insightv.pictures import Pictures

_CONCURRENCY = {"transformers": 8, "llamacpp": SLOTS}
_MANY = 256
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 20.0
_LONGEST_ASKED = 120.0
"""Of the pauses that servers ask for."""
_BUSY = (408, 425, 429, 503)
"""Not now: waited out with patience. Other failures count as tries."""
_SPILL = 1.5
"""A replica with so many times the mean in flight leaves further requests to the next."""
_SPARE = 8
_BROKEN = 30
"""Failures in a row of requests that had failed before, after which the server is broken."""
_SUSPECT = 2
"""A request that was under way at so many deaths of servers is asked alone from then on."""
_TURN = 0.05
_SECOND_LOOK = 2.0
_OTHERS = 60.0
"""Seconds that the rest of several servers is waited for once the first has answered."""
_PROBE = 10.0
_TELL = 30.0

log = logging.getLogger(__name__)
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class _Replica:
    """One server, as the engine sees it: one that runs, or one of our own."""

    def __init__(self, url: str, key: str, own: OwnServer | None = None):
        self._url, self._key, self.own = url, key, own
        self.name = url
        self.flying = self.suspects = self.failed = 0
        self.down = ""
        self.gone: ServerGone | None = None
        self._look: asyncio.Task[bool] | None = None

    @property
    def url(self) -> str:
        return self.own.address if self.own else self._url

    @property
    def key(self) -> str:
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


class _Again(Exception):
    """It may work later.

    Attributes:
        patient: The request is not to blame.
        after: Seconds the server asks to be left alone.
        died: The server was well, and died or hung with the request under way.
    """

    def __init__(self, problem: str, patient: bool, after: float = 0.0, died: bool = False):
        super().__init__(problem)
        self.patient, self.after, self.died = patient, after, died


class ServerEngine:
    """Completes chats with servers (see ``insightv.engines.base.Engine``).

    Nothing is started or asked before the first request. All that is asked about a picture
    goes to the same replica (rendezvous hashing), so that its prefix cache serves all paths and
    steps of a question.
    """

    def __init__(
        self,
        model_folder: str | Path,
        config: EngineConfig,
        pictures: Pictures,
        logs: Path | None = None,
        share: float = 1.0,
    ):
        """Reads the model's folder: its digest, tokenizer and template.

        Raises:
            UserError: The folder or the configuration is wrong.
        """
        config.validate()
        folder = Path(model_folder).absolute()
        self.digest = models.digest_of(folder)
        self._config, self._server = config, config.server
        self._chats = Chats(folder, pictures, config.cache_mb * 2**20)
        self._dialect, self._name = self._server.speaks, self._server.model
        if self._server.url:
            key = read_key(self._server.key_file)
            self._replicas = [_Replica(_root(url), key) for url in self._server.url]
        else:
            self._name = self._name or str(folder)
            self._replicas = []
            for number, gpus in enumerate(split_gpus(self._server.replicas)):
                own = OwnServer(config, folder, self._name, logs, gpus, share)
                self._replicas.append(_Replica("", "", own))
                self._replicas[-1].name = str(number)
        each = self._server.concurrency or _CONCURRENCY.get(self._dialect, _MANY)
        self.concurrency = each * len(self._replicas)
        self.context = config.context or models.longest_input(folder)
        self._encoders = ThreadPoolExecutor(config.encoders, "encode")
        self._client: Client | None = None
        self._opening: asyncio.Task[None] | None = None
        self._room: asyncio.Semaphore | None = None
        self._heard: float | None = None

    async def complete(self, request: Request) -> Completion:
        """Completes one chat.

        Raises:
            RecordError: This request cannot be served.
            UserError: The servers cannot be used as they are configured.
            ServerGone: They are gone for good.
        """
        if self._opening is None:
            self._client = Client(self._server.timeout, self.concurrency)
            self._room = asyncio.Semaphore(self.concurrency)
            self._opening = asyncio.get_running_loop().create_task(self._open())
        await asyncio.shield(self._opening)
        assert self._room is not None
        loop = asyncio.get_running_loop()
        async with self._room:
            body = await loop.run_in_executor(self._encoders, self._body, request)
            return await self._ask(_subject(request), body, request)

    def count(self, request: Request) -> int:
        """Length of the request's prompt in tokens, pictures included."""
        return self._chats.count(request)

    async def close(self) -> None:
        """Ends the servers that were started here."""
        if self._opening is not None:
            self._opening.cancel()
        await asyncio.gather(*(r.own.close() for r in self._replicas if r.own))
        if self._client is not None:
            await self._client.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def _body(self, request: Request) -> bytes:
        shown = self._chats.shown(request)
        prompt = self._chats.prompt(request)
        length = self._chats.length(prompt, shown)
        room = self.context - length
        if room < 1:
            raise RecordError(f"prompt of {length} tokens, context of {self.context}")
        return payload(
            self._dialect,
            self._name,
            request,
            self._chats.texts(request),
            [picture.url for picture in shown],
            prompt,
            min(request.sampling.max_tokens, room),
            # `transformers serve` fails at them, unless it is started here.
            self._dialect != "transformers" or bool(self._server.preset),
        )

    # ---- opening

    async def _open(self) -> None:
        """Starts the servers, or looks at those that run.

        Engines start their servers one after the other: while one of them measures how much of a
        GPU's memory is free, no other may take any.
        """
        assert self._client is not None
        client = self._client
        turn = _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with turn:
            own = [replica for replica in self._replicas if replica.own]
            ready = (replica.own.ready(client) for replica in own if replica.own)
            self._sift(own, await asyncio.gather(*ready, return_exceptions=True))
        left = [replica for replica in self._replicas if replica.gone is None]
        looks = (self._look(replica) for replica in left)
        self._sift(left, await asyncio.gather(*looks, return_exceptions=True))
        silent = [replica.gone for replica in self._replicas if replica.gone]
        if self._server.url and len(silent) == len(self._replicas):
            raise UserError(str(silent[0]))
        if not self._dialect:
            raise UserError(
                f"engine.server.dialect: {self._replicas[0].url} does not say what it is; give "
                "vllm, sglang, transformers, llamacpp or openai"
            )

    def _sift(self, replicas: list[_Replica], found: list[BaseException | None]) -> None:
        """Gives up the replicas that did not come; any other problem is raised."""
        for replica, problem in zip(replicas, found, strict=True):
            if isinstance(problem, ServerGone):
                self._give_up(replica, problem)
            elif problem is not None:
                raise problem

    async def _look(self, replica: _Replica) -> None:
        """Asks a server what it has: is the key right, the model there, its context known?

        Raises:
            UserError: It has not what is wanted.
            ServerGone: It did not answer.
        """
        assert self._client is not None
        begun = told = time.monotonic()
        while True:
            try:
                reply = await self._client.ask(
                    f"{replica.url}/v1/models", replica.key, timeout=_PROBE
                )
                if reply.status not in (*_BUSY, 502, 504):
                    break
                problem = reply.problem
            except (Unreachable, Late) as error:
                problem = str(error)
            except Garbled as error:
                raise UserError(f"{replica.url} is no OpenAI-compatible server: {error}") from None
            now = time.monotonic()
            late = self._heard is not None and now - self._heard > _OTHERS
            if late or now - begun > self._server.start:
                seconds = _OTHERS if late else self._server.start
                raise ServerGone(
                    f"{replica.url} did not answer within {seconds:g} s ({problem}); "
                    "start that server, or mend engine.server.url"
                )
            if now - told >= _TELL:
                told = now
                log.warning("waiting for %s for %.0f s: %s", replica.url, now - begun, problem)
            await asyncio.sleep(random.uniform(0.5, 2.0))
        self._refuse(reply, replica)
        self._heard = self._heard or time.monotonic()
        if reply.status == 200:
            self._take(reply, replica)
        elif not self._name or not self._dialect:
            raise UserError(
                f"{replica.url} does not list its models ({reply.problem}); give "
                "engine.server.model and engine.server.dialect"
            )

    def _take(self, reply: Reply, replica: _Replica) -> None:
        """Notes the model's name, its context and the kind of server from a list of models."""
        try:
            listed = {str(model["id"]): model for model in reply.json()["data"]}
        except (Garbled, KeyError, TypeError):
            raise UserError(
                f"{replica.url} is no OpenAI-compatible server: {excerpt(reply.body)}"
            ) from None
        if not self._name:
            if len(listed) != 1:
                names = ", ".join(excerpt(name, 60) for name in listed) or "none"
                raise UserError(
                    f"{replica.url} has several models, or tells none ({names}); give the one "
                    "to use as engine.server.model"
                )
            (self._name,) = listed
        known = listed.get(self._name, {})
        if not known and self._dialect != "transformers":  # which lists others than it serves
            names = ", ".join(excerpt(name, 60) for name in listed) or "none"
            raise UserError(f"{replica.url} has no model {self._name!r}; it has {names}")
        self._dialect = self._dialect or DIALECTS_TOLD.get(str(known.get("owned_by")), "")
        meta = known.get("meta")  # of llama.cpp, which divides its context among its slots
        slot = meta.get("n_ctx") if isinstance(meta, dict) else None
        for longest in (known.get("max_model_len"), slot):
            if isinstance(longest, int) and longest > 0:
                self.context = min(self.context, longest)

    def _refuse(self, reply: Reply, replica: _Replica) -> None:
        """Raises for what no further request can mend.

        Raises:
            UserError: A wrong key, a wrong address.
        """
        if reply.status in (401, 403):
            hint = "" if replica.own else "; mend engine.server.key_file"
            raise UserError(f"{replica.url} refuses the key ({reply.problem}){hint}")
        if 300 <= reply.status < 400:
            raise UserError(f"{replica.url} sends elsewhere, where nothing is sent; mend the url")

    # ---- asking

    async def _ask(self, subject: str, body: bytes, request: Request) -> Completion:
        """Asks until there is an answer, or no more hope of one."""
        failures, deaths, waited, pause = 0, 0, 0.0, _FIRST_PAUSE
        while True:
            replica = self._choose(subject)
            begun = time.monotonic()
            try:
                return await self._try(replica, body, request, deaths >= _SUSPECT, failures > 0)
            except ServerGone as error:
                self._give_up(replica, error)
                waited = 0.0
                continue
            except _Again as again:
                problem = again
            deaths += problem.died
            if problem.died and deaths > _SUSPECT:
                raise RecordError(
                    f"servers died of it {deaths} times: {self._blame(replica, problem)}"
                )
            if problem.patient:
                if replica.own is None:  # `start` and `restarts` bound the wait for one of our own.
                    waited += time.monotonic() - begun
                if waited > self._server.patience:
                    told = f"{replica.url} could not be used for {waited:.0f} s: {problem}"
                    self._give_up(replica, ServerGone(told))
                    waited = 0.0
                    continue
            else:
                failures += 1
                if failures >= self._server.tries:
                    raise RecordError(f"the server failed {failures} times: {problem}")
            pause = min((2 if problem.patient else 4) * pause, _LONGEST_PAUSE)
            # Never all at once: those that a server sends away together would come back together.
            delay = min(problem.after, _LONGEST_ASKED) + random.uniform(pause / 4, pause)
            waited += delay
            await asyncio.sleep(delay)

    async def _try(
        self, replica: _Replica, body: bytes, request: Request, alone: bool, failed: bool
    ) -> Completion:
        """One attempt, with others under way or ``alone``; the request may have ``failed`` before.

        Raises:
            _Again: It may work later.
            RecordError: Never for this request.
            UserError: Never for any.
            ServerGone: Never again with this replica.
        """
        assert self._client is not None
        async with replica.flight(alone):
            if replica.own is not None:
                await replica.own.ready(self._client)
            url = replica.url
            if replica.down == url and not await replica.well(self._client, url):
                raise _Again("it is not well", patient=True)
            replica.down = ""
            try:
                reply = await self._client.ask(f"{url}/v1/chat/completions", replica.key, body)
                if reply.status == 200:
                    done = read(reply.json(), request)
                    replica.failed = 0
                    return done
            except (Unreachable, Late, Garbled) as error:
                raise await self._failure(replica, url, error, failed) from None
            if reply.status >= 500:
                raise await self._failure(replica, url, reply, failed)
        if reply.status in _BUSY:
            raise _Again(reply.problem, True, reply.retry_after)
        own = replica.own
        if own is not None and (reply.status in (401, 403) or not own.listens()):
            raise _Again(f"another server answers at {url}", patient=True)
        self._refuse(reply, replica)
        if reply.status in (404, 405):
            raise UserError(f"{url}/v1/chat/completions: {reply.problem}; mend engine.server")
        replica.failed = 0
        raise RecordError(f"the server refuses the request: {reply.problem}")

    async def _failure(
        self,
        replica: _Replica,
        url: str,
        cause: Unreachable | Late | Garbled | Reply,
        failed: bool,
    ) -> _Again:
        """What an attempt without an answer means: is it this request, or is the server dead?

        Raises:
            ServerGone: The server is broken, and not ours to start again.
        """
        assert self._client is not None
        told = isinstance(cause, Reply)
        problem = cause.problem if isinstance(cause, Reply) else str(cause)
        alive = isinstance(cause, Garbled) or await replica.well(self._client, url)
        if told and not alive:  # It may only have been too busy to say so.
            await asyncio.sleep(_SECOND_LOOK)
            alive = await replica.well(self._client, url)
        if isinstance(cause, Reply) and cause.status in _BUSY and alive:
            return _Again(problem, True, cause.retry_after)
        if alive:
            if failed:  # What all that is under way fails at once is over with that once.
                self._note_failure(replica, url)
            return _Again(problem, patient=False)
        replica.down = url
        if not isinstance(cause, Unreachable):
            self._restart(replica, url, "is not well" if told else "hangs")
        refused = isinstance(cause, Unheard) or (isinstance(cause, Reply) and cause.status in _BUSY)
        return _Again(problem, patient=True, died=not refused)

    def _blame(self, replica: _Replica, problem: _Again) -> str:
        """What a server said that died with one request alone under way."""
        if replica.own is None:
            return str(problem)
        replica.own.forgive()
        return f"{problem}; it said last: {replica.own.last_words()}"

    def _note_failure(self, replica: _Replica, url: str) -> None:
        """Counts failures in a row: a server that fails at everything is broken.

        Raises:
            ServerGone: It is, and not ours to start again.
        """
        replica.failed += 1
        if replica.failed >= _BROKEN:
            replica.failed = 0
            if replica.own is None:
                raise ServerGone(f"{url} fails at everything: {_BROKEN} times in a row")
            self._restart(replica, url, f"has failed {_BROKEN} times in a row")

    def _restart(self, replica: _Replica, url: str, why: str) -> None:
        """Ends a server of our own, unless that has been done; its keeper starts another."""
        if replica.own is not None and replica.url == url and replica.own.running:
            log.warning("the server at %s %s and is ended", url, why)
            replica.own.kill()

    def _give_up(self, replica: _Replica, error: ServerGone) -> None:
        """Asks a replica no more."""
        if replica.gone is None:
            replica.gone = error
            left = sum(other.gone is None for other in self._replicas)
            if left:
                log.warning("a server is gone, %d are left: %s", left, error)

    def _choose(self, subject: str) -> _Replica:
        """The replica of a subject; the next in its order where that one is overrun or gone.

        Raises:
            ServerGone: There is none any more.
        """
        left = [replica for replica in self._replicas if replica.gone is None]
        if not left:
            raise next(replica.gone for replica in self._replicas if replica.gone)
        ranked = sorted(left, key=lambda replica: _rank(replica.name, subject))
        most = _SPARE + _SPILL * sum(replica.flying for replica in left) / len(left)
        return next((replica for replica in ranked if replica.flying < most), ranked[0])


def _subject(request: Request) -> str:
    """What requests have in common that share a long prefix: pictures, or how they begin."""
    return "\0".join(request.pictures) or request.messages[0].text


def _rank(name: str, subject: str) -> bytes:
    return hashlib.sha256(f"{name}\0{subject}".encode(errors="replace")).digest()


def _root(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
