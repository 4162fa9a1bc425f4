"""The endpoint: requests in, replies out, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hpc.errors import RecordError
from insightv.engines.server.transformers_serve import Keyed
from insightv.records import Question
from insightv.serving.agents import Agents, Piece
from insightv.serving.asking import MOST_BYTES, LentPictures, Refused, parse


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
