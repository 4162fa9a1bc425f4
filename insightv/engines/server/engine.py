"""The engine behind HTTP: its replicas, which of them is asked, and what is asked again."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
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
    Unreachable,
    excerpt,
)
from insightv.engines.server.config import read_key
from insightv.engines.server.dialects import DIALECTS_TOLD, payload
from insightv.engines.server.process import OwnServer, ServerGone
from insightv.engines.server.programs import SLOTS, split_gpus
from insightv.engines.server.replicas import BUSY, Again, Replica
from insightv.pictures import Pictures

_CONCURRENCY = {"transformers": 8, "llamacpp": SLOTS}
_MANY = 256
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 20.0
_LONGEST_ASKED = 120.0
"""Of the pauses that servers ask for."""
_SPILL = 1.5
"""A replica with so many times the mean in flight leaves further requests to the next."""
_SPARE = 8
_SUSPECT = 2
"""A request that was under way at so many deaths of servers is asked alone from then on."""
_OTHERS = 60.0
"""Seconds that the rest of several servers is waited for once the first has answered."""
_PROBE = 10.0
_TELL = 30.0

log = logging.getLogger(__name__)
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


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
            self._replicas = [Replica(_root(url), key) for url in self._server.url]
        else:
            self._name = self._name or str(folder)
            self._replicas = []
            for number, gpus in enumerate(split_gpus(self._server.replicas)):
                own = OwnServer(config, folder, self._name, logs, gpus, share)
                self._replicas.append(Replica("", "", own))
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

    def _sift(self, replicas: list[Replica], found: list[BaseException | None]) -> None:
        """Gives up the replicas that did not come; any other problem is raised."""
        for replica, problem in zip(replicas, found, strict=True):
            if isinstance(problem, ServerGone):
                self._give_up(replica, problem)
            elif problem is not None:
                raise problem

    async def _look(self, replica: Replica) -> None:
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
                if reply.status not in (*BUSY, 502, 504):
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
        replica.refuse(reply)
        self._heard = self._heard or time.monotonic()
        if reply.status == 200:
            self._take(reply, replica)
        elif not self._name or not self._dialect:
            raise UserError(
                f"{replica.url} does not list its models ({reply.problem}); give "
                "engine.server.model and engine.server.dialect"
            )

    def _take(self, reply: Reply, replica: Replica) -> None:
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

    # ---- asking

    async def _ask(self, subject: str, body: bytes, request: Request) -> Completion:
        """Asks until there is an answer, or no more hope of one."""
        assert self._client is not None
        failures, deaths, waited, pause = 0, 0, 0.0, _FIRST_PAUSE
        while True:
            replica = self._choose(subject)
            begun = time.monotonic()
            try:
                return await replica.attempt(
                    self._client, body, request, deaths >= _SUSPECT, failures > 0
                )
            except ServerGone as error:
                self._give_up(replica, error)
                waited = 0.0
                continue
            except Again as again:
                problem = again
            deaths += problem.died
            if problem.died and deaths > _SUSPECT:
                raise RecordError(f"servers died of it {deaths} times: {replica.blame(problem)}")
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

    def _give_up(self, replica: Replica, error: ServerGone) -> None:
        """Asks a replica no more."""
        if replica.gone is None:
            replica.gone = error
            left = sum(other.gone is None for other in self._replicas)
            if left:
                log.warning("a server is gone, %d are left: %s", left, error)

    def _choose(self, subject: str) -> Replica:
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
