"""HTTP to a server that is not trusted: bounded in time and size, never redirected."""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import cycle
from typing import Any

import httpx2

MOST_BYTES = 16 * 2**20
"""Of an answer. The longest completions are some hundred kilobytes."""
_CONNECT_SECONDS = 10.0
_SHOWN = 200
_POOL = 16


class Unreachable(Exception):
    """Nobody listens, or the connection broke: nothing was answered."""


class Unheard(Unreachable):
    """Nobody listens: nothing was sent."""


class Late(Exception):
    """There was no answer in time."""


class Garbled(Exception):
    """The answer cannot be read, or is too long."""


@dataclass(frozen=True)
class Reply:
    """An answer, whatever its status."""

    status: int
    body: bytes
    retry_after: float = 0.0

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            Garbled: It is none.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise Garbled(f"an answer that is no JSON: {excerpt(self.body)}") from None

    @property
    def problem(self) -> str:
        """Status and the server's own words, short and escaped."""
        try:
            told = self.json()
            inner = told.get("error", told) if isinstance(told, dict) else told
            for name in ("message", "detail"):
                if isinstance(inner, dict) and inner.get(name):
                    inner = inner[name]
            text = inner if isinstance(inner, str) else json.dumps(inner)
        except Garbled:
            text = self.body.decode(errors="replace")
        return f"status {self.status}: {excerpt(text)}"


class Client:
    """Asks servers; many requests at once."""

    def __init__(self, timeout: float, flying: int):
        """Nothing is connected yet.

        Args:
            timeout: Seconds for one answer, from its first byte sent to its last received.
            flying: How many requests are under way at once.
        """
        self._timeout = timeout
        # A pool looks through all its connections at each request: many small ones are faster.
        pools = [_pool() for _ in range(-(-flying // _POOL))]
        self._pools, self._turn = pools, cycle(pools)

    async def ask(
        self, url: str, key: str, body: bytes | None = None, timeout: float = 0.0
    ) -> Reply:
        """Posts a body, or gets what is there.

        Raises:
            Unreachable: There was no answer, and will be none; `Unheard` if nothing was sent.
            Late: There was none in time.
            Garbled: It is longer than any answer should be, or no HTTP.
        """
        headers = {"accept-encoding": "identity", "accept": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        if body is not None:
            headers["content-type"] = "application/json"
        method = "GET" if body is None else "POST"
        seconds = timeout or self._timeout
        try:
            async with (
                asyncio.timeout(seconds),
                next(self._turn).stream(method, url, content=body, headers=headers) as response,
            ):
                parts, size = [], 0
                # Raw: what unpacks itself has no bound.
                async for part in response.aiter_raw():
                    size += len(part)
                    if size > MOST_BYTES:
                        raise Garbled(f"an answer of more than {MOST_BYTES:,} bytes")
                    parts.append(part)
                wait = _seconds(response.headers.get("retry-after", ""))
                return Reply(response.status_code, b"".join(parts), wait)
        except TimeoutError:
            raise Late(f"no answer within {seconds:g} s") from None
        except (httpx2.RemoteProtocolError, httpx2.DecodingError) as error:
            # A server that dies hangs up in the midst of an answer; that too ends here.
            raise Unreachable(f"no HTTP answer: {excerpt(str(error))}") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Unheard(excerpt(str(error) or type(error).__name__)) from None
        except (httpx2.TransportError, OSError) as error:
            raise Unreachable(excerpt(str(error) or type(error).__name__)) from None

    async def close(self) -> None:
        """Closes all connections."""
        for pool in self._pools:
            await pool.aclose()


def _seconds(after: str) -> float:
    """How long to wait by a Retry-After, which is a number of seconds or a date."""
    try:
        told = float(after)
    except ValueError:
        try:
            told = parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, told) if math.isfinite(told) else 0.0


def _pool() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=2 * _POOL),
        follow_redirects=False,
        # Proxies are for the outside, and certificates of users' own have no place here.
        trust_env=False,
    )


def whole(text: str) -> str:
    """A text without halves of characters: JSON can hold them, tokenizers and files cannot."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def excerpt(text: str | bytes, most: int = _SHOWN) -> str:
    """Some of a text that is not trusted, on one line, control characters escaped."""
    if isinstance(text, bytes):
        text = text[: 4 * most].decode(errors="replace")
    text = " ".join(text[: 4 * most].split())
    shown = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
