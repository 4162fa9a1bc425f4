"""The endpoint behind a real socket: clients that hurry, leave, crowd in or send rubbish."""

import asyncio
import base64
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import uvicorn
from PIL import Image

from insightv.engines import Completion, EngineConfig, load_engine
from insightv.evaluation.answering import CallConfig, EntryConfig
from insightv.folders import model_folder
from insightv.prompting import load_prompts
from insightv.serving import Agents, LentPictures, application

KEY = {"authorization": "Bearer s3cret"}
TINY, HERE = model_folder("tiny"), EngineConfig(device="cpu", threads=1)
ENTRY = EntryConfig(
    "serve", "multi_agent", "-", "-", CallConfig(0.0, max_tokens=80), CallConfig(0.0, max_tokens=24)
)


class Slow:
    """An engine whose calls take as long as a test wants, and are seen to be given up."""

    context = 4096

    def __init__(self):
        self.hold = threading.Event()
        self.flying = self.given_up = 0

    def count(self, request):
        return 7

    async def complete(self, request):
        self.flying += 1
        try:
            while not self.hold.is_set():
                await asyncio.sleep(0.01)
            if request.sampling.max_tokens == 13:
                raise RuntimeError("the server died 4 times\x1b[31m")
            return Completion("one two three", 3, "length")
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.flying -= 1

    async def close(self):
        pass


@contextmanager
def served(load):
    """The application in a thread; yields its address and the pictures it holds."""
    held = LentPictures()
    agents = Agents(lambda role: load(held), load_prompts("tiny"), ENTRY)
    app = application(agents, held, "s3cret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        running = threading.Thread(target=server.run, args=([listener],))
        running.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions", held
        finally:
            server.should_exit = True
            running.join()


def picture(side=32, colour="teal"):
    packed = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(packed, "PNG")
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()


def body(*shown, text="What is A?", model="direct", **more):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in shown]
    parts.append({"type": "text", "text": text})
    return {"model": model, "messages": [{"role": "user", "content": parts}], **more}


def until(true, seconds=20.0):
    begun = time.monotonic()
    while not true() and time.monotonic() < begun + seconds:
        time.sleep(0.02)
    assert true()


def test_clients_that_leave_end_their_calls_and_take_their_pictures_along():
    engine = Slow()
    with served(lambda held: engine) as (url, held), httpx2.Client(headers=KEY) as client:
        for stream in (False, True, True):
            asked = json.dumps(body(picture(), stream=stream)).encode()
            host, port = url.split("/")[2].split(":")
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\n"
                f"authorization: Bearer s3cret\r\ncontent-length: {len(asked)}\r\n\r\n"
            )
            given_up = engine.given_up
            with socket.create_connection((host, int(port))) as leaving:
                leaving.sendall(head.encode() + asked)
                until(lambda: engine.flying == 1)
                assert held._held
            until(lambda seen=given_up: engine.given_up == seen + 1)
            until(lambda: not held._held and not held._users)
        engine.hold.set()
        assert client.post(url, json=body(picture())).status_code == 200
        assert not held._held


def test_what_goes_wrong_behind_the_endpoint_is_told():
    engine = Slow()
    engine.hold.set()
    with served(lambda held: engine) as (url, held), httpx2.Client(headers=KEY) as client:
        reply = client.post(url, json=body(max_tokens=13))
        assert reply.status_code == 500
        assert "the server died 4 times\\x1b[31m" in reply.json()["error"]["message"]
        flow = client.post(url, json=body(max_tokens=13, stream=True)).text
        assert "the server died 4 times" in flow and flow.endswith("data: [DONE]\n\n")
        reply = client.post(url, json=body(picture(), "data:image/png;base64,AAAA"))
        assert reply.status_code == 400 and not held._held  # the good one is not kept
        long = client.post(url, json=body(stop=["three", "two"])).json()["choices"][0]
        assert long["message"]["content"] == "one " and long["finish_reason"] == "stop"
        cut = client.post(url, json=body(response_format={"type": "text"})).json()["choices"][0]
        assert cut["message"]["content"] == "one two three" and cut["finish_reason"] == "length"
        for wrong, told in (
            ({"stop": 7}, "stop is a text"),
            ({"stop": ["a", ""]}, "stop is a text"),
            ({"stop": list("abcde")}, "up to 4"),
            ({"logit_bias": {"7": 1}}, "logit_bias is not to be had"),
            ({"messages": []}, "give a list of turns"),
        ):
            refused = client.post(url, json=body() | wrong)
            assert refused.status_code == 400 and told in refused.json()["error"]["message"]
        rubbish = client.post(url, content=b'{"model": "\xff\xfe')
        assert rubbish.status_code == 400 and "no JSON" in rubbish.text


def test_streams_tell_what_they_took_and_many_are_served_at_once():
    with served(lambda held: load_engine(TINY, HERE, held)) as (url, held):

        def chat(number):
            asked = body(picture(colour=(number, 0, 0)), model="multi-agent", stream=True)
            asked["stream_options"] = {"include_usage": True}
            with httpx2.Client(headers=KEY, timeout=300) as client:
                return client.post(url, json=asked).text

        with ThreadPoolExecutor(3) as pool:
            flows = list(pool.map(chat, range(3)))
        with httpx2.Client(headers=KEY, timeout=300) as client:
            half = client.post(url, content=json.dumps(body(text="What is \ud83d?"))).json()
        assert not held._held
    assert half["choices"][0]["message"]["content"]
    for flow in flows:
        *events, done = [line.removeprefix("data: ") for line in flow.strip().split("\n\n")]
        assert done == "[DONE]"
        *chunks, last = map(json.loads, events)
        assert last["choices"] == [] and last["usage"]["prompt_tokens"] > 64
        kinds = [kind for chunk in chunks for kind in chunk["choices"][0]["delta"]]
        assert kinds[0] == "role" and kinds[-1] == "content"
        assert last["usage"]["completion_tokens"] > 10 and "reasoning_content" in kinds
        assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
