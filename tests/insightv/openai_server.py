"""A small OpenAI-compatible server that answers as a test wants it to.

In a thread (``with FakeServer(answer) as server``) or as a program of its own
(``python openai_server.py PORT``), which asks for the key in INSIGHTV_SERVER_KEY.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], Any]


def completion(text: str, finish: str = "stop", tokens: int = 3) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"completion_tokens": tokens},
    }


class FakeServer:
    """Answers ``answer(body, n)``: a completion, or (status, body), or (status, body, headers).

    ``n`` counts chat requests from 0. A body may be bytes; None hangs up without a word.
    """

    def __init__(self, answer: Answer, models: Any = None, key: str = "", port: int = 0):
        self.answer, self.key = answer, key
        self.models = [{"id": "m", "owned_by": "vllm"}] if models is None else models
        self.healthy: bool | None = True  # None: there is no such page
        self.bodies: list[dict[str, Any]] = []
        self.flying = self.most_flying = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/health":
                    self.reply({True: 200, False: 503, None: 404}[owner.healthy], {})
                elif self.path != "/v1/models":
                    self.reply(404, {"error": {"message": "no such page"}})
                elif self.known():
                    told = owner.models
                    done = told if isinstance(told, tuple) else (200, {"data": told})
                    self.reply(*done)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if not self.known():
                    return
                with owner.lock:
                    number = len(owner.bodies)
                    owner.bodies.append(body)
                    owner.flying += 1
                    owner.most_flying = max(owner.most_flying, owner.flying)
                try:
                    done = owner.answer(body, number)
                finally:
                    with owner.lock:
                        owner.flying -= 1
                self.reply(*(done if isinstance(done, tuple) else (200, done)))

            def known(self) -> bool:
                known = self.headers.get("authorization", "") in ("Bearer " + owner.key, owner.key)
                if not known:
                    self.reply(401, {"error": "wrong key"})
                return known

            def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                if body is None:
                    self.close_connection = True
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle()

        ThreadingHTTPServer.daemon_threads = True
        ThreadingHTTPServer.request_queue_size = 512
        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def main() -> None:
    name = sys.argv[2]

    def answer(body: dict[str, Any], number: int) -> Any:
        if os.environ.get("DIE_AT") == str(number):
            os._exit(7)
        if os.environ.get("POISON") == str(body["seed"]):
            print("CUDA out of memory", flush=True)
            if os.environ.get("WEDGED"):
                server.healthy = False
            else:
                os._exit(1)
        if not server.healthy:
            return (500, {"error": {"message": "the engine is dead"}})
        time.sleep(float(os.environ.get("SLOW", "0.02")))
        return completion(f"reply to {body['seed']}")

    key = os.environ["INSIGHTV_SERVER_KEY"]
    models = [{"id": name, "owned_by": "vllm"}]
    server = FakeServer(answer, models, key, port=int(sys.argv[1]))
    print("listening", flush=True)
    server.http.serve_forever(0.05)


if __name__ == "__main__":
    main()
