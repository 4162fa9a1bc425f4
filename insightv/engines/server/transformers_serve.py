"""``transformers serve`` with what it lacks as an engine.

It gets a key, without which nobody is answered; stop strings for models with pictures (it
hands their processor to what wants a tokenizer); texts that keep the space they begin with;
draws that belong to a request's seed, whatever is asked at the same time; and a list of models
that has the one it serves (its own is of the hub's cache, and fails where there is none).

``python transformers_serve.py MODEL --port P …`` takes the options of ``transformers serve``;
the key stands in INSIGHTV_SERVER_KEY. Runs in the environment that transformers is installed
in, which need not be this package's.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

OPEN = ("/health",)
"""Answered without a key: says only that there is a server."""


class Keyed:
    """ASGI middleware: requests without the key get 401."""

    def __init__(self, app: Callable[..., Awaitable[None]], key: str):
        """Wraps ``app``."""
        self.app, self.wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hands a request on, or refuses it."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        known = scope["type"] == "lifespan" or scope.get("path") in OPEN
        if known or hmac.compare_digest(given, self.wanted):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"detail": "wrong key"}'})


_seed: ContextVar[int] = ContextVar("seed", default=0)


async def generate(
    self: Any, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
) -> tuple[str, int, Any]:
    """Stands in for ``GenerateManager.generate_non_streaming``; all run in one thread there."""
    import torch

    tokenizer, seed = getattr(processor, "tokenizer", processor), _seed.get()

    def run() -> Any:
        torch.manual_seed(seed)
        return model.generate(**inputs, generation_config=gen_config, tokenizer=tokenizer)

    def decode(ids: Any) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    sequence = (await self.async_submit(run))[0]
    length = inputs["input_ids"].shape[-1]
    # Decoders that drop a leading space must see what stands before.
    before = max(0, length - 4)
    prefix, text = decode(sequence[before:length]), decode(sequence[before:])
    text = text[len(prefix) :] if text.startswith(prefix) else decode(sequence[length:])
    return text, length, sequence[length:]


def main() -> None:
    """Runs the server until it is ended."""
    key = os.environ.pop("INSIGHTV_SERVER_KEY")
    # Lets processors of picture-and-video families load without torchvision, where it is known.
    with contextlib.suppress(ImportError):
        import insightv.models  # noqa: F401
    from transformers.cli.serving import model_manager, server, utils
    from transformers.cli.transformers import app as transformers

    patched: Any = utils
    patched.set_torch_seed = _seed.set
    patched.GenerateManager.generate_non_streaming = generate
    served = {"id": sys.argv[1], "object": "model", "created": 0, "owned_by": "transformers"}
    patched = model_manager
    patched.ModelManager.get_gen_models = staticmethod(lambda: [served])
    build = server.build_server

    def build_keyed(*args: Any, **options: Any) -> Any:
        app = build(*args, **options)
        app.add_middleware(Keyed, key=key)
        return app

    server.build_server = build_keyed
    # A line for each of some million requests is no log.
    logging.getLogger("uvicorn.access").addFilter(lambda record: False)
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    transformers()


if __name__ == "__main__":
    main()
