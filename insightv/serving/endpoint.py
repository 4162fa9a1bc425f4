"""The endpoint: requests in, replies out, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hpc.errors import RecordError
from insightv.engines.server.client import excerpt
from insightv.engines.server.transformers_serve import Keyed
from insightv.records import Question
from insightv.serving.agents import Agents, Piece
from insightv.serving.asking import MOST_BYTES, Asked, LentPictures, Refused, parse

T = TypeVar("T")

log = logging.getLogger(__name__)


def application(agents: Agents, pictures: LentPictures, key: str) -> Any:
    """The ASGI application; each request needs the key, but for ``/health``."""

    async def models(request: Request) -> Response:
        listed = [
            {"id": n, "object": "model", "created": 0, "owned_by": "insightv"}
            for n in agents.offered
        ]
        return JSONResponse({"object": "list", "data": listed})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def chat(request: Request) -> Response:
        names: list[str] = []
        streams = False
        try:
            asked = parse(await _body(request), agents.offered)
            for data in asked.pictures:
                names.append(await asyncio.to_thread(pictures.lend, data))
            question = Question("asked:here:0", asked.text, tuple(names), "", "text")
            reply = _Reply(agents, asked, question)
            if asked.stream:
                streams = True
                return _Stream(reply.events(), lambda: _give_back(pictures, names))
            return JSONResponse(await _unless_left(request, reply.whole()))
        except (Refused, RecordError) as error:
            return _error(getattr(error, "status", 400), str(error))
        except Exception as error:
            return _error(500, _failed(error))
        finally:
            if not streams:
                _give_back(pictures, names)

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
                raise Refused(f"a request of more than {MOST_BYTES:,} bytes", 413)
            parts.append(part)
        return json.loads(b"".join(parts))
    except ClientDisconnect:
        raise Refused("the client has left", 499) from None
    except (ValueError, RecursionError):
        raise Refused("the body is no JSON") from None


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What work gives; it is ended when the client leaves.

    Raises:
        Refused: The client has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # all else of the request has been read
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused("the client has left", 499)
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


class _Stream(StreamingResponse):
    """Server-sent events; ``done`` is called however they end, also before the first."""

    def __init__(self, events: AsyncGenerator[str], done: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream")
        self._done = done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


class _Reply:
    """A reply in the protocol's words."""

    def __init__(self, agents: Agents, asked: Asked, question: Question):
        self._agents, self._asked, self._question = agents, asked, question
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }

    async def whole(self) -> dict[str, Any]:
        """All of it in one piece."""
        async with aclosing(self._agents.reply(self._asked, self._question)) as reply:
            pieces = [piece async for piece in reply]
        message = {"role": "assistant", "content": _joined(pieces, "content")}
        if reasoning := _joined(pieces, "reasoning_content"):
            message["reasoning_content"] = reasoning
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": pieces[-1].finish}],
            "usage": await self._usage(pieces),
        }

    async def events(self) -> AsyncGenerator[str]:
        """Server-sent events: who speaks, the pieces, why they ended, what they took."""
        pieces: list[Piece] = []
        try:
            yield self._chunk({"role": "assistant"})
            async with aclosing(self._agents.reply(self._asked, self._question)) as reply:
                async for piece in reply:
                    pieces.append(piece)
                    yield self._chunk({piece.kind: piece.text})
            yield self._chunk({}, pieces[-1].finish)
            if self._asked.usage:
                yield self._event(choices=[], usage=await self._usage(pieces))
        except RecordError as error:
            yield _sent({"error": {"message": str(error)}})
        except Exception as error:
            yield _sent({"error": {"message": _failed(error)}})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        return self._event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])

    def _event(self, **told: Any) -> str:
        return _sent({**self._head, "object": "chat.completion.chunk", **told})

    async def _usage(self, pieces: list[Piece]) -> dict[str, int]:
        prompt = await asyncio.to_thread(self._agents.count, self._asked, self._question)
        spent = sum(piece.tokens for piece in pieces)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": spent,
            "total_tokens": prompt + spent,
        }


def _joined(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def _sent(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def _failed(error: Exception) -> str:
    """What a client is told of a failure that is not its own; the rest stands in the log."""
    log.exception("a chat failed")
    return excerpt(f"the model cannot answer: {error or type(error).__name__}", 400)


def _error(status: int, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "code": status}
    return JSONResponse({"error": error}, status_code=status)
