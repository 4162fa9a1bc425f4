"""HTTP to a server that is not trusted: bounded in time and size, never redirected."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx2

MOST_BYTES = 16 * 2**20
"""Of an answer. The longest completions are some hundred kilobytes."""
_CONNECT_SECONDS = 10.0
_SHOWN = 200


class Unreachable(Exception):
    """Nobody listens, or the connection broke: nothing was answered."""


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

    def __init__(self, timeout: float):
        """Nothing is connected yet.

        Args:
            timeout: Seconds for one answer, from its first byte sent to its last received.
        """
        self._timeout = timeout
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256),
            follow_redirects=False,
            # Proxies are for the outside, and certificates of users' own have no place here.
            trust_env=False,
        )

    async def ask(
        self, url: str, key: str, body: bytes | None = None, timeout: float = 0.0
    ) -> Reply:
        """Posts a body, or gets what is there.

        Raises:
            Unreachable: There was no answer, and will be none.
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
                self._http.stream(method, url, content=body, headers=headers) as response,
            ):
                parts, size = [], 0
                # Raw: what unpacks itself has no bound.
                async for part in response.aiter_raw():
                    size += len(part)
                    if size > MOST_BYTES:
                        raise Garbled(f"an answer of more than {MOST_BYTES:,} bytes")
                    parts.append(part)
                after = response.headers.get("retry-after", "")
                wait = float(after) if after.isascii() and after.isdigit() else 0.0
                return Reply(response.status_code, b"".join(parts), wait)
        except TimeoutError:
            raise Late(f"no answer within {seconds:g} s") from None
        except (httpx2.RemoteProtocolError, httpx2.DecodingError) as error:
            # A server that dies hangs up in the midst of an answer; that too ends here.
            raise Unreachable(f"no HTTP answer: {excerpt(str(error))}") from None
        except (httpx2.TransportError, OSError) as error:
            raise Unreachable(excerpt(str(error) or type(error).__name__)) from None

    async def close(self) -> None:
        """Closes all connections."""
        await self._http.aclose()


def excerpt(text: str | bytes, most: int = _SHOWN) -> str:
    """Some of a text that is not trusted, on one line, control characters escaped."""
    if isinstance(text, bytes):
        text = text[: 4 * most].decode(errors="replace")
    text = " ".join(text[: 4 * most].split())
    shown = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
