"""The server engine against a server that answers in every wrong way there is."""

import asyncio
import base64
import io
import json
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from openai_server import FakeServer, completion
from PIL import Image

from hpc.config import shaping
from hpc.errors import RecordError, UserError
from insightv.chainfile import checked
from insightv.engines import EngineConfig, Request, Sampling, load_engine
from insightv.engines.server import client, engine, replicas
from insightv.engines.server.client import excerpt
from insightv.engines.server.config import ServerConfig
from insightv.engines.server.process import ServerGone
from insightv.folders import model_folder
from insightv.pictures import Pictures, PictureWriter
from insightv.records import Message

TINY = model_folder("tiny")
CONFIGS = Path(__file__).parents[2] / "configs"


def encoded(form: str = "PNG", mode: str = "RGB", **options) -> bytes:
    packed = io.BytesIO()
    Image.new(mode, (64, 48), 7 if mode in "LP" else "teal").save(packed, form, **options)
    return packed.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    with PictureWriter(folder) as writer:
        for number in range(40):
            packed = io.BytesIO()
            Image.new("RGB", (64, 48), (number, 0, 0)).save(packed, "PNG")
            writer.add(packed.getvalue())
        writer.add(b"this is no picture")
    return Pictures([folder])


def ask(pictures, *requests, config=None, **server):
    """Completes all at once with an engine of its own; replies or exceptions, and the engine."""

    async def all_of_them():
        engine = load_engine(
            TINY,
            EngineConfig(kind="server", server=ServerConfig(**server), **(config or {})),
            pictures,
        )
        try:
            replies = (engine.complete(request) for request in requests)
            return await asyncio.gather(*replies, return_exceptions=True), engine
        finally:
            await engine.close()

    return asyncio.run(all_of_them())


def request(text="What is A?", picture=None, seed=1, stop=(), messages=None, **sampling):
    shown = () if picture is None else (picture,)
    turns = messages or (Message("user", text),)
    return Request(turns, shown, Sampling(**{"max_tokens": 9} | sampling), seed, stop)


def once(pictures, answer, *requests, models=None, **settings):
    """Asks a server that answers so; the replies."""
    with FakeServer(answer, models) as server:
        replies, _ = ask(pictures, *(requests or [request()]), url=[server.url], **settings)
        return replies if len(replies) > 1 else replies[0], server


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(engine, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(engine, "_LONGEST_PAUSE", 0.3)
    monkeypatch.setattr(engine, "_LONGEST_ASKED", 0.3)
    monkeypatch.setattr(replicas, "_SECOND_LOOK", 0.05)


# ---- what is asked, and what comes back


def test_a_request_is_complete_and_explicit(pictures):
    shown = next(iter(pictures))
    asked = request("Look.", shown, 77, ("}",), temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    reply, server = once(pictures, lambda body, n: completion("a b} c", "stop", 5), asked)
    assert (reply.text, reply.tokens, reply.finish) == ("a b", 5, "stop")
    (body,) = server.bodies
    picture, text = body.pop("messages")[0]["content"]
    assert text == {"type": "text", "text": "Look."}
    kind, data = picture["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == pictures.bytes(shown)
    assert body == {
        "model": "m",
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "seed": 77,
        "stop": ["}"],
    }


def test_a_turn_is_gone_on_with(pictures):
    turns = (Message("user", "Go."), Message("assistant", '{"title": "A <image> "}\n'))
    _, server = once(pictures, lambda body, n: completion("x"), request(messages=turns))
    (body,) = server.bodies
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    written = body["messages"][1]["content"][0]["text"]
    assert written == '{"title": "A < image> "}\n'  # no control token in data
    for options, wrong in (
        ({"messages": turns}, "cannot go on with a turn"),
        ({"repetition_penalty": 1.2}, "no repetition_penalty"),
    ):
        asked = request(**options)
        reply, server = once(pictures, lambda body, n: completion("x"), asked, dialect="openai")
        assert isinstance(reply, UserError) and wrong in str(reply) and not server.bodies


@pytest.mark.parametrize(
    ("finish", "text", "wanted"),
    [("length", "cut", "length"), ("stop", "whole", "stop"), ("length", "a} b", "stop")],
)
def test_why_a_text_ended(pictures, finish, text, wanted):
    reply, _ = once(pictures, lambda body, n: completion(text, finish), request(stop=("}",)))
    assert reply.finish == wanted


def test_room_is_what_the_context_leaves(pictures):
    models = [{"id": "m", "owned_by": "vllm", "max_model_len": 100}]
    long = request("word " * 200)
    near = request("What is A?", next(iter(pictures)), max_tokens=500)
    replies, server = once(pictures, lambda body, n: completion("x"), long, near, models=models)
    assert isinstance(replies[0], RecordError) and "context of 100" in str(replies[0])
    (body,) = server.bodies
    assert 0 < body["max_tokens"] < 36  # 64 tokens are the picture


def test_models_and_dialects_are_found_or_asked_for(pictures):
    two = [{"id": "m", "owned_by": "vllm"}, {"id": "other", "owned_by": "vllm"}]
    for models, settings, wrong in (
        (two, {}, "several models"),
        (two, {"model": "mm"}, "no model 'mm'"),
        ([{"id": "m", "owned_by": "me"}], {}, "dialect"),
        ((404, {"error": "no"}), {}, "does not list its models (status 404: no)"),
        ((200, b"<html>"), {}, "no OpenAI-compatible server: <html>"),
        ((302, {}, {"location": "http://127.0.0.1:9/"}), {}, "sends elsewhere"),
    ):
        reply, server = once(pictures, lambda b, n: completion("x"), models=models, **settings)
        assert isinstance(reply, UserError) and wrong in str(reply), reply
        assert "\n" not in str(reply) and not server.bodies
    given = {"model": "x", "dialect": "openai"}
    reply, server = once(pictures, lambda b, n: completion("y"), models=(404, {}), **given)
    assert reply.text == "y" and server.bodies[0]["model"] == "x"


# ---- pictures


def test_pictures_are_sent_as_they_are_where_all_see_the_same(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    forms = {
        "png": encoded(),
        "grey": encoded(mode="L"),
        "jpeg": encoded("JPEG"),
        "webp": encoded("WEBP"),
        "gif": encoded("GIF", "P"),
        "clear": encoded(mode="RGBA"),
        "cmyk": encoded("JPEG", "CMYK"),
        "turned": encoded("JPEG", exif=turned),
        "bmp": encoded("BMP"),
    }
    with PictureWriter(tmp_path) as writer:
        names = {form: writer.add(data) for form, data in forms.items()}
    pictures = Pictures([tmp_path])
    asked = [request(picture=name, seed=n) for n, name in enumerate(names.values())]
    _, server = once(pictures, lambda body, n: completion("x"), *asked)
    sent = {body["seed"]: body["messages"][0]["content"][0] for body in server.bodies}
    for number, (form, name) in enumerate(names.items()):
        data = base64.b64decode(sent[number]["image_url"]["url"].split(",")[1])
        assert (data == forms[form]) == (form in ("png", "grey", "jpeg", "webp")), form
        seen = Image.open(io.BytesIO(data)).convert("RGB")
        assert seen.tobytes() == pictures.image(name).tobytes(), form


def test_a_picture_is_encoded_once_and_a_broken_one_fails_its_request(pictures, monkeypatch):
    *names, broken = pictures
    read = []
    monkeypatch.setattr(
        Pictures,
        "image",
        lambda self, name, plain=Pictures.image: read.append(name) or plain(self, name),
    )
    asked = [request(picture=names[0], seed=n) for n in range(9)] + [request(picture=broken)]
    replies, _ = once(pictures, lambda body, n: completion("x"), *asked)
    assert isinstance(replies[-1], RecordError) and "cannot be decoded" in str(replies[-1])
    assert all(reply.text == "x" for reply in replies[:-1])
    assert read.count(names[0]) == 1


# ---- what goes wrong


def test_busy_servers_are_waited_for(pictures):
    bad = {0: (429, {}, {"retry-after": "0"}), 1: (503, {"error": "loading"}), 2: (408, {})}
    reply, server = once(pictures, lambda body, n: bad.get(n, completion("at last")))
    assert reply.text == "at last" and len(server.bodies) == 4


def test_pauses_that_servers_ask_for_are_numbers_or_dates():
    in_a_minute = formatdate(time.time() + 60, usegmt=True)
    assert 55 < client._seconds(in_a_minute) <= 60 and client._seconds("2.5") == 2.5
    for told in ("", "soon", "-3", "nan", "1e999", "Thu, 01 Jan 1970 00:00:00 GMT", "9" * 400):
        assert client._seconds(told) == 0


def test_a_server_that_is_down_behind_its_gateway_is_waited_for(pictures):
    """Every page fails, as behind a proxy: no request is to blame, however many there are."""

    def answer(body, number):
        if number == 0:
            server.healthy = False
            threading.Timer(1, setattr, (server, "healthy", True)).start()
        return completion("x") if server.healthy else (502, b"<html>Bad gateway")

    asked = [request(seed=n) for n in range(40)]
    with FakeServer(answer) as server:
        replies, _ = ask(pictures, *asked, url=[server.url])
    assert [getattr(reply, "text", reply) for reply in replies] == ["x"] * 40
    assert len(server.bodies) < 120  # pictures are not sent to a server that is known to be down


def test_a_server_without_a_page_for_its_health(pictures, monkeypatch):
    with FakeServer(lambda body, n: completion("x") if n else (200, None)) as server:
        server.healthy = None
        (reply,), _ = ask(pictures, request(), url=[server.url])
    assert reply.text == "x"


def test_one_of_several_that_does_not_come_is_left_out(pictures, monkeypatch, caplog):
    monkeypatch.setattr(engine, "_OTHERS", 0.2)
    asked = [request(f"What is {n}?", seed=n) for n in range(20)]
    with FakeServer(lambda body, n: completion("x")) as server:
        replies, _ = ask(pictures, *asked, url=[server.url, "http://127.0.0.1:9"])
    assert all(reply.text == "x" for reply in replies)
    assert "1 are left: http://127.0.0.1:9 did not answer" in caplog.text


def test_a_server_that_stays_busy_fails_the_shard(pictures):
    begun = time.monotonic()
    reply, server = once(pictures, lambda body, n: (429, {}, {"retry-after": "9" * 9}), patience=1)
    assert isinstance(reply, ServerGone) and not isinstance(reply, RecordError | UserError)
    assert time.monotonic() - begun < 60 and len(server.bodies) >= 2  # not the 30 years asked for


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((500, {"error": {"message": "CUDA out of memory"}}), "status 500: CUDA out of memory"),
        ((500, b"Internal Server Error"), "Internal Server Error"),
        ((200, b"{not json"), "no JSON: {not json"),
        ((200, b"[" * 60_000), "no JSON"),
        ((200, {"choices": []}), "without a completion"),
        ((200, completion("x", tokens=None)), "without a text"),
        ((200, completion("x", "abort")), "broke the completion off"),
        ((200, None), "no HTTP answer"),
        ((200, b"x" * 70_000), "more than 65,536 bytes"),
    ],
)
def test_failures_are_tried_again_and_then_fail_their_record(pictures, answer, told, monkeypatch):
    monkeypatch.setattr(client, "MOST_BYTES", 65_536)
    poison = request("poison")

    def reply(body, number):
        asked = body["messages"][0]["content"][0]["text"]
        return answer if asked == "poison" else completion("fine")

    replies, server = once(pictures, reply, poison, request("other"))
    assert replies[1].text == "fine"
    assert isinstance(replies[0], RecordError) and "failed 3 times" in str(replies[0])
    assert told in str(replies[0])
    assert len(server.bodies) == 4
    first = iter([answer, completion("second time")])
    assert once(pictures, lambda body, n: next(first))[0].text == "second time"


def test_an_answer_kept_apart_as_reasoning_is_none(pictures):
    apart = completion(None, tokens=40)
    apart["choices"][0]["message"]["reasoning_content"] = "The bars say 3."
    reply, server = once(pictures, lambda body, n: apart)
    assert isinstance(reply, RecordError) and "without a reasoning parser" in str(reply)
    assert len(server.bodies) == 1
    reply, _ = once(pictures, lambda body, n: completion(None, tokens=1))
    assert reply.text == ""


def test_halves_of_characters_are_replaced(pictures):
    reply, _ = once(pictures, lambda body, n: completion("a \ud83d b \U0001f600"))
    assert reply.text == "a \ufffd b \U0001f600"


def test_a_late_answer_is_one_that_failed(pictures):
    def slow(body, number):
        time.sleep(1.0)
        return completion("late")

    reply, _ = once(pictures, slow, timeout=0.2)
    assert isinstance(reply, RecordError) and "no answer within 0.2 s" in str(reply)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_fails_its_record_at_once(pictures, status):
    told = "maximum context length is 10 tokens\x1b[2J\u202e\n" + "x" * 9000
    bad = (status, {"error": {"message": told}})
    reply, server = once(pictures, lambda body, n: bad)
    assert isinstance(reply, RecordError) and "maximum context length" in str(reply)
    assert str(reply).isprintable() and len(str(reply)) < 300
    assert len(server.bodies) == 1


def test_redirects_are_not_followed(pictures):
    with FakeServer(lambda body, n: completion("stolen")) as other:
        away = (307, {}, {"location": f"{other.url}/v1/chat/completions"})
        reply, _ = once(pictures, lambda body, n: away)
        assert isinstance(reply, UserError) and "sends elsewhere" in str(reply)
        assert not other.bodies


def test_the_key_is_read_given_and_its_refusal_told(pictures, tmp_path):
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    key.chmod(0o600)
    with FakeServer(lambda body, n: completion("x"), key="s3cret") as server:
        (reply,), _ = ask(pictures, request(), url=[server.url], key_file=str(key))
        assert reply.text == "x"
        (reply,), _ = ask(pictures, request(), url=[server.url])
        assert isinstance(reply, UserError) and "refuses the key" in str(reply)
        key.chmod(0o644)
        with pytest.raises(UserError, match="chmod 600"):
            ask(pictures, request(), url=[server.url], key_file=str(key))
        key.chmod(0o600)
        key.write_text("")
        with pytest.raises(UserError, match="holds no key"):
            ask(pictures, request(), url=[server.url], key_file=str(key))
        with pytest.raises(UserError, match="cannot be read"):
            ask(pictures, request(), url=[server.url], key_file=str(tmp_path / "none"))


def test_nobody_there_is_told_in_one_line(pictures):
    with FakeServer(lambda body, n: completion("x")) as server:
        url = server.url
    (reply,), _ = ask(pictures, request(), url=[url], start=0.5)
    assert isinstance(reply, UserError) and "did not answer within 0.5 s" in str(reply)


def test_a_server_that_leaves_for_good_fails_the_shard(pictures):
    def leave(body, number):
        server.http.socket.close()  # nobody listens any more

    with FakeServer(leave) as server:
        server.healthy = False
        (reply,), _ = ask(pictures, request(), url=[server.url], patience=0.5)
    assert isinstance(reply, ServerGone)


def test_a_server_that_fails_at_everything_is_broken(pictures):
    asked = [request(seed=n) for n in range(40)]
    replies, _ = once(pictures, lambda body, n: (500, {"error": "device-side assert"}), *asked)
    assert any(isinstance(reply, ServerGone) for reply in replies)


# ---- many at once, and several servers


def test_as_many_fly_as_are_allowed(pictures):
    def slow(body, number):
        time.sleep(0.03)
        return completion(str(body["seed"]))

    asked = [request(seed=n) for n in range(300)]
    replies, server = once(pictures, slow, *asked, concurrency=20)
    assert [reply.text for reply in replies] == [str(n) for n in range(300)]
    assert 15 <= server.most_flying <= 20


def test_what_is_asked_of_a_picture_goes_to_one_replica(pictures):
    names = [*pictures][:-1]
    asked = [request(f"{turn}?", name, seed=turn) for name in names for turn in range(4)]
    with (
        FakeServer(lambda body, n: completion("x")) as one,
        FakeServer(lambda body, n: completion("x")) as two,
    ):
        found, engine = ask(
            pictures, *asked, url=[one.url, f"{two.url}/v1/"], concurrency=2, config={"encoders": 1}
        )
    assert all(reply.text == "x" for reply in found)
    assert engine.concurrency == 4

    def seen(server):
        return [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]

    assert not {*seen(one)} & {*seen(two)}
    assert len({*seen(one)} | {*seen(two)}) == len(names)
    assert min(len({*seen(one)}), len({*seen(two)})) >= 8  # both have work


def test_no_replica_is_overrun(pictures):
    def slow(body, number):
        time.sleep(0.02)
        return completion("x")

    name = next(iter(pictures))
    with FakeServer(slow) as one, FakeServer(slow) as two:
        ask(
            pictures,
            *(request(picture=name, seed=n) for n in range(200)),
            url=[one.url, two.url],
            concurrency=50,
        )
    assert min(len(one.bodies), len(two.bodies)) > 20


def test_other_replicas_take_over(pictures):
    asked = [request(f"What is {n}?", seed=n) for n in range(60)]
    busy = (503, {"error": "down"})
    with (
        FakeServer(lambda body, n: completion("x")) as one,
        FakeServer(lambda body, n: busy) as two,
    ):
        replies, _ = ask(pictures, *asked, url=[one.url, two.url], patience=0.3)
    assert all(getattr(reply, "text", "") == "x" for reply in replies)


# ---- the configuration


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({}, "give url"),
        ({"url": ["http://127.0.0.1:1"], "command": ["vllm"]}, "one of both"),
        ({"command": ["my-server"]}, "dialect: say what 'my-server' is like"),
        ({"command": ["vllm"], "dialect": "klingon"}, "dialect is 'klingon'"),
        ({"url": ["127.0.0.1:8000"]}, "no address"),
        ({"url": ["http://"]}, "no address"),
        ({"url": ["ftp://127.0.0.1"]}, "no address"),
        ({"url": ["http://me:word@127.0.0.1:1"]}, "keys go into key_file"),
        ({"url": ["http://10.0.0.1:8000"]}, "can be reached by others"),
        ({"url": ["http://gpu7:8000"]}, "can be reached by others"),
        ({"url": ["http://127.0.0.1:1"] * 2}, "twice"),
        ({"command": ["vllm"], "replicas": 0}, "replicas is 0"),
        ({"command": ["vllm"], "timeout": 0.0}, "timeout is 0.0"),
        ({"command": ["vllm"], "key_file": "key"}, "key_file: only of servers at url"),
        ({"url": ["http://127.0.0.1:1"], "options": ["--x"]}, "only presets"),
        ({"command": ["vllm"], "image": "vllm"}, "image is 'vllm'; give a file that ends in .sif"),
        ({"command": ["vllm"], "image": "/v.sif", "binds": ["data"]}, "binds: 'data'"),
        ({"command": ["vllm"], "binds": ["/data"]}, "binds: only an image"),
    ],
)
def test_impossible_settings_are_told(settings, wrong):
    with pytest.raises(UserError, match=wrong) as told:
        EngineConfig(kind="server", server=ServerConfig(**settings)).validate()
    assert str(told.value).startswith("engine.server")


@pytest.mark.parametrize("name", ["vllm-node", "vllm-nodes"])
def test_the_examples_can_be_used(name):
    found = checked(CONFIGS / "engine" / f"{name}.yaml")
    assert found.engine.server.preset == "vllm"
    assert (found.models.generator.engine is None) == (name == "vllm-node")
    assert shaping(found) == shaping(checked(CONFIGS / "chain" / "own-model.yaml")) or (
        name == "vllm-nodes"
    )


def test_one_models_engine_is_checked_and_named():
    with pytest.raises(UserError, match="models.generator.engine.server: give url"):
        checked(
            CONFIGS / "chain" / "smoke.yaml",
            ["models.generator.engine={kind: server, server: {}}"],
        )


def test_excerpts_are_short_and_harmless():
    assert excerpt("a\x1b[31m\n\u202e b") == "a\\x1b[31m \\u202e b"
    assert len(excerpt("\x00" * 10**6)) == 200 and excerpt(b"\xff" * 9).isprintable()
    assert json.loads(json.dumps(excerpt("é"))) == "é"
