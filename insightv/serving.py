"""Both agents of a run behind one OpenAI-compatible endpoint.

A model name for each way of answering: ``direct`` and ``base-reasoning`` are the base, asked for
the answer or told to reason first; ``single-agent`` reasons and answers in one turn;
``summary-only`` is the summary agent alone, ``multi-agent`` the pair. The reasoning comes as
``reasoning_content``, as chat clients know it from reasoning models, then the answer as
``content``; streamed, that of the pair step by step.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hpc.errors import RecordError
from insightv.agents import (
    DirectAgent,
    FinalAgent,
    MultiAgent,
    ReasoningAgent,
    SummaryAgent,
    direct_messages,
    reasoning_messages,
    summary_messages,
)
from insightv.curation.controls import parse_direct
from insightv.engines.base import Engine, Sampling
from insightv.engines.base import Request as Call
from insightv.engines.server.client import excerpt
from insightv.engines.server.transformers_serve import Keyed
from insightv.evaluation.answering import EntryConfig
from insightv.evaluation.asking import steps_aloud
from insightv.pictures import Pictures, decode
from insightv.prompting import Prompts
from insightv.questions.texts import said_with_pictures
from insightv.records import Question, seed_for
from insightv.steps import parse_steps, render_steps

MODELS = ("direct", "base-reasoning", "single-agent", "summary-only", "multi-agent")
_SPEAKS_FIRST = {
    "direct": "base",
    "base-reasoning": "base",
    "single-agent": "single",
    "summary-only": "summary",
    "multi-agent": "reasoning",
}
MOST_BYTES = 64 * 2**20
"""Of a request: some large pictures."""
MOST_PICTURES = 16
_DATA_URL = re.compile(r"data:image/[a-z.+-]+;base64,", re.I)
_REFUSED = ("tools", "functions", "response_format", "logprobs", "top_logprobs", "audio")
"""What a client would miss if it were passed over."""


class Refused(Exception):
    """A request that cannot be served as it is."""


class LentPictures(Pictures):
    """Pictures in memory while requests that show them are under way."""

    def __init__(self) -> None:
        """Holds none yet."""
        super().__init__([])
        self._held: dict[str, bytes] = {}
        self._users: Counter[str] = Counter()

    def lend(self, data: bytes) -> str:
        """Takes an encoded picture; returns its id.

        Raises:
            RecordError: It cannot be decoded.
        """
        name = hashlib.sha256(data).hexdigest()
        if name not in self._held:
            decode(data, name[:12])
            self._held[name] = data
        self._users[name] += 1
        return name

    def give_back(self, name: str) -> None:
        """Forgets a picture that no other request shows."""
        self._users[name] -= 1
        if not self._users[name]:
            del self._users[name], self._held[name]

    def bytes(self, picture: str) -> bytes:
        """The encoded picture.

        Raises:
            RecordError: It is not held.
        """
        if picture not in self._held:
            raise RecordError(f"picture {picture[:12]} is not there any more")
        return self._held[picture]


@dataclass(frozen=True)
class Asked:
    """A chat request, checked.

    Attributes:
        model: One of `MODELS`.
        text: The last user turn.
        pictures: All pictures of the user's turns, encoded.
        stream: Whether the reply comes in pieces.
        seed: Of the draws.
        temperature: None: as the run was evaluated.
        top_p: Likewise.
        tokens: Most tokens of the answer; 0: as the run was evaluated.
    """

    model: str
    text: str
    pictures: tuple[bytes, ...]
    stream: bool
    seed: int
    temperature: float | None = None
    top_p: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """A part of a reply, and the tokens it took so far."""

    kind: Literal["reasoning_content", "content"]
    text: str
    tokens: int = 0


class Agents:
    """What answers: the run's models, each loaded when it is first asked for."""

    def __init__(
        self,
        load: Callable[[str], Engine],
        prompts: Prompts,
        entry: EntryConfig,
        offered: tuple[str, ...] = MODELS,
    ):
        """Takes what is known of a run.

        Args:
            load: Loads ``base``, ``single``, ``reasoning`` or ``summary``.
            prompts: The set they were trained with.
            entry: Sampling of reasoning and answer.
            offered: The models that the run has what is needed for.
        """
        self.offered = offered
        self._load, self._prompts, self._entry = load, prompts, entry
        self._engines: dict[str, Engine] = {}

    def engine(self, role: str) -> Engine:
        """The engine of a role."""
        if role not in self._engines:
            self._engines[role] = self._load(role)
        return self._engines[role]

    async def close(self) -> None:
        """Closes all engines."""
        for engine in {id(engine): engine for engine in self._engines.values()}.values():
            await engine.close()

    def count(self, asked: Asked, question: Question) -> int:
        """Length of the prompt that begins a reply, in tokens.

        Raises:
            RecordError: The engine cannot serve it.
        """
        if asked.model == "direct":
            messages = direct_messages(self._prompts, question)
        elif asked.model == "summary-only":
            messages = summary_messages(self._prompts, question, None)
        else:
            messages = reasoning_messages(self._prompts, question)
        return self.engine(_SPEAKS_FIRST[asked.model]).count(
            Call(messages, question.pictures, Sampling())
        )

    async def reply(self, asked: Asked, question: Question) -> AsyncIterator[Piece]:
        """The pieces of a reply.

        Raises:
            RecordError: An engine cannot serve it.
        """
        entry = replace(
            self._entry,
            reasoning=replace(self._entry.reasoning),
            answer=replace(self._entry.answer),
        )
        for call in (entry.reasoning, entry.answer):
            call.temperature = call.temperature if asked.temperature is None else asked.temperature
            call.top_p = asked.top_p or call.top_p
        entry.answer.max_tokens = asked.tokens or entry.answer.max_tokens
        answer, thought = entry.answer.sampling(), entry.reasoning.sampling()
        seed = seed_for(asked.seed, "serve", asked.model)
        if asked.model == "direct":
            agent = DirectAgent(self.engine("base"), self._prompts, answer)
            found = await agent.answer(question, seed=seed)
            yield Piece("content", found.text, found.tokens)
        elif asked.model == "single-agent":
            reasoner = ReasoningAgent(self.engine("single"), self._prompts, thought)
            async for piece in _at_once(reasoner, question, thought, seed):
                yield piece
        elif asked.model == "summary-only":
            found = await self._summary(answer).answer(question, None, seed)
            yield Piece("content", found.text, found.tokens)
        elif asked.model == "multi-agent" and asked.stream:
            async for piece in self._aloud(question, entry, seed):
                yield piece
        else:  # as the evaluation asks: the whole chain in one call
            reasoner = ReasoningAgent(
                self.engine(_SPEAKS_FIRST[asked.model]), self._prompts, thought
            )
            alone = asked.model == "base-reasoning"
            last = FinalAgent(reasoner.engine, self._prompts, answer)
            pair = MultiAgent(reasoner, last if alone else self._summary(answer))
            reasoning, said = await pair.answer(question, seed)
            yield Piece("reasoning_content", reasoning.text, reasoning.tokens)
            yield Piece("content", said.text, said.tokens)

    async def _aloud(
        self, question: Question, entry: EntryConfig, seed: int
    ) -> AsyncIterator[Piece]:
        steps = []
        reasoner = self.engine("reasoning")
        async for heard in steps_aloud(reasoner, self._prompts, question, entry, seed):
            if heard.step is None:
                yield Piece("reasoning_content", f"{heard.text}\n")
                continue
            steps.append(heard.step)
            yield Piece("reasoning_content", f"{render_steps([heard.step])}\n")
        summary = self._summary(entry.answer.sampling())
        said = await summary.answer(question, render_steps(steps), seed)
        yield Piece("content", said.text, said.tokens)

    def _summary(self, sampling: Sampling) -> SummaryAgent:
        return SummaryAgent(self.engine("summary"), self._prompts, sampling)


async def _at_once(
    reasoner: ReasoningAgent, question: Question, sampling: Sampling, seed: int
) -> AsyncIterator[Piece]:
    """Steps and answer of a model that writes both in one turn."""
    messages = reasoning_messages(reasoner.prompts, question)
    done = await reasoner.engine.complete(Call(messages, question.pictures, sampling, seed))
    text, answer = parse_direct(done.text)
    steps = parse_steps(text).steps
    yield Piece("reasoning_content", render_steps(steps) if steps else text)
    yield Piece("content", answer, done.tokens)


# ---- requests


def parse(body: Any, offered: tuple[str, ...]) -> Asked:
    """Checks a chat request.

    Raises:
        Refused: It is none, or asks for what is not to be had.
    """
    if not isinstance(body, dict):
        raise Refused("the body is no JSON object")
    model = body.get("model")
    if model not in offered:
        raise Refused(f"no model '{excerpt(str(model), 60)}': use {', '.join(offered)}")
    for name in _REFUSED:
        if body.get(name):
            raise Refused(f"{name} is not to be had here")
    if _number(body, "n", 1) != 1:
        raise Refused("n is 1 here: ask again with another seed")
    texts: list[str] = []
    pictures: list[bytes] = []
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages: give a list of turns")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in (
            "system",
            "developer",
            "user",
            "assistant",
        ):
            raise Refused("messages: each turn has a role (system, user or assistant) and content")
        if message["role"] == "user":
            text, shown = _content(message.get("content"), len(pictures))
            texts.append(text)
            pictures += shown
    if messages[-1]["role"] != "user" or not texts[-1].strip():
        raise Refused("messages: the last turn must be the user's, and ask something")
    if len(pictures) > MOST_PICTURES:
        raise Refused(f"{len(pictures)} pictures: {MOST_PICTURES} at most")
    warm, top = body.get("temperature"), body.get("top_p")
    name = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    return Asked(
        model=model,
        text=texts[-1],
        pictures=tuple(pictures),
        stream=bool(body.get("stream")),
        seed=int(_number(body, "seed", 0, -(2.0**63), 2.0**63)),
        temperature=None if warm is None else _number(body, "temperature", 0, 0, 100),
        top_p=None if top is None else _number(body, "top_p", 1, 1e-6, 1),
        tokens=int(_number(body, name, 0, 1, 1_000_000)),
    )


def _content(content: Any, before: int) -> tuple[str, list[bytes]]:
    """A turn's text and pictures; ``before`` are those of earlier turns."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise Refused("messages: content is a text or a list of parts")
    texts: list[str | None] = []
    pictures = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            pictures.append(_picture(part.get("image_url")))
            texts.append(None)
        else:
            raise Refused("messages: a part is of type text or image_url")
    return said_with_pictures(texts, before), pictures


def _picture(given: Any) -> bytes:
    """The bytes of a data URL; nothing is fetched from anywhere."""
    url = given.get("url") if isinstance(given, dict) else given
    found = _DATA_URL.match(url) if isinstance(url, str) else None
    if found is None:
        raise Refused("image_url: give the picture itself, as data:image/png;base64,…")
    try:
        return base64.b64decode(found.string[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise Refused("image_url: that is no base64") from None


def _number(
    body: Mapping[str, Any], name: str, usual: float, low: float = 1, high: float = 1e9
) -> float:
    value = body.get(name)
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(f"{name} must be a number from {low:g} to {high:g}")
    return value


# ---- the application


def application(agents: Agents, pictures: LentPictures, key: str) -> Any:
    """The ASGI application; each request needs the key, but for ``/health``."""

    async def models(request: Request) -> Response:
        listed = [{"id": n, "object": "model", "owned_by": "insightv"} for n in agents.offered]
        return JSONResponse({"object": "list", "data": listed})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def chat(request: Request) -> Response:
        names: list[str] = []
        try:
            asked = parse(await _body(request), agents.offered)
            names = [pictures.lend(data) for data in asked.pictures]
            question = Question("asked:here:0", asked.text, tuple(names), "", "text")
            pieces = agents.reply(asked, question)
            if asked.stream:
                events = _events(asked.model, pieces, lambda: _give_back(pictures, names))
                return StreamingResponse(events, media_type="text/event-stream")
            try:
                found = [piece async for piece in pieces]
                prompt = await asyncio.to_thread(agents.count, asked, question)
                return JSONResponse(_whole(asked.model, found, prompt))
            finally:
                _give_back(pictures, names)
        except (Refused, RecordError) as error:
            _give_back(pictures, names)
            return _error(400, str(error))

    @asynccontextmanager
    async def closing(app: Starlette) -> AsyncIterator[None]:
        yield
        await agents.close()

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=closing)
    return Keyed(app, key)


def _give_back(pictures: LentPictures, names: list[str]) -> None:
    while names:
        pictures.give_back(names.pop())


async def _body(request: Request) -> Any:
    """The body as JSON, bounded.

    Raises:
        Refused: It is too long, or no JSON.
    """
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MOST_BYTES:
                raise Refused(f"a request of more than {MOST_BYTES:,} bytes")
            parts.append(part)
        return json.loads(b"".join(parts))
    except ClientDisconnect:
        raise Refused("the client has left") from None
    except (ValueError, RecursionError):
        raise Refused("the body is no JSON") from None


def _whole(model: str, pieces: list[Piece], prompt: int) -> dict[str, Any]:
    """A reply in one piece."""
    texts = {
        kind: "".join(piece.text for piece in pieces if piece.kind == kind)
        for kind in ("reasoning_content", "content")
    }
    spent = sum(piece.tokens for piece in pieces)
    message = {"role": "assistant", "content": texts["content"]}
    if texts["reasoning_content"]:
        message["reasoning_content"] = texts["reasoning_content"]
    return {
        **_head(model, "chat.completion"),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": spent,
            "total_tokens": prompt + spent,
        },
    }


async def _events(
    model: str, pieces: AsyncIterator[Piece], done: Callable[[], None]
) -> AsyncIterator[str]:
    """A reply as server-sent events."""
    head = _head(model, "chat.completion.chunk")

    def event(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    try:
        yield event({"role": "assistant"})
        async for piece in pieces:
            yield event({piece.kind: piece.text})
        yield event({}, "stop")
    except RecordError as error:
        yield f"data: {json.dumps({'error': {'message': str(error)}})}\n\n"
    finally:
        done()
    yield "data: [DONE]\n\n"


def _head(model: str, kind: str) -> dict[str, Any]:
    made = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": made, "object": kind, "created": int(time.time()), "model": model}


def _error(status: int, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "code": status}
    return JSONResponse({"error": error}, status_code=status)
