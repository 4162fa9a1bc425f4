"""The agents behind the OpenAI protocol, with the embedded model in every role."""

import asyncio
import base64
import io
import itertools
import json
from dataclasses import replace

import httpx2
import pytest
from PIL import Image

from hpc.errors import RecordError, UserError
from insightv.agents import DirectAgent, FinalAgent, MultiAgent, ReasoningAgent, SummaryAgent
from insightv.cli.serving import _key, _listening
from insightv.demo.sets import QuestionsConfig, Sizes, make_questions
from insightv.engines import EngineConfig, Sampling, load_engine
from insightv.evaluation.answering import CallConfig, EntryConfig
from insightv.folders import model_folder
from insightv.pictures import Pictures, PictureWriter
from insightv.prompting import load_prompts
from insightv.serving import MODELS, Agents, LentPictures, application
from insightv.steps import parse_steps

KEY = "s3cret"
ALONE = ("base-reasoning", "summary-only")
PROMPTS = load_prompts("tiny")
ENTRY = EntryConfig(
    "serve",
    "multi_agent",
    "-",
    "-",
    CallConfig(0.0, max_tokens=160),
    CallConfig(0.0, max_tokens=24),
)
TINY, HERE = model_folder("tiny"), EngineConfig(device="cpu", threads=1)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    with PictureWriter(folder) as writer:
        found = list(make_questions("test", QuestionsConfig(*[Sizes(test=1)] * 3), 0, writer))
    return found, Pictures([folder])


def serve(scenario, offered=MODELS):
    """Runs ``await scenario(client, pictures)`` against the application."""

    async def whole():
        pictures = LentPictures()
        agents = Agents(lambda role: load_engine(TINY, HERE, pictures), PROMPTS, ENTRY, offered)
        transport = httpx2.ASGITransport(application(agents, pictures, KEY))
        headers = {"authorization": f"Bearer {KEY}"}
        try:
            async with httpx2.AsyncClient(
                transport=transport, base_url="http://here", headers=headers
            ) as client:
                return await scenario(client, pictures)
        finally:
            await agents.close()
            assert not pictures._held and not pictures._users

    return asyncio.run(whole())


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def body(text="What is A?", data=None, model="direct", **more):
    parts = [{"type": "text", "text": text}]
    if data is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": url(data)}})
    return {"model": model, "messages": [{"role": "user", "content": parts}], **more}


def said(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]


def streamed(text):
    """The deltas of a stream, joined by kind, and how many there were."""
    lines = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    joined: dict[str, str] = {}
    order = []
    for event in events:
        for kind, piece in event["choices"][0]["delta"].items():
            joined[kind] = joined.get(kind, "") + piece
            order.append(kind)
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    return joined, order


def test_replies_are_those_of_the_agents(asked):
    questions, pictures = asked

    async def alone():
        engine = load_engine(TINY, HERE, pictures)
        long, short = Sampling(max_tokens=160), Sampling(max_tokens=24)
        direct = DirectAgent(engine, PROMPTS, short)
        pair = MultiAgent(
            ReasoningAgent(engine, PROMPTS, long), SummaryAgent(engine, PROMPTS, short)
        )
        found = []
        for question in questions:
            thought, answer = await pair.answer(question)
            steps = await pair.reasoning.reason(question)
            final = await FinalAgent(engine, PROMPTS, short).answer(question, steps.text)
            unaided = await pair.summary.answer(question, None)
            found.append((await direct.answer(question), thought, answer, final, unaided))
        await engine.close()
        return found

    async def served(client, held):
        found = []
        for question in questions:
            data = pictures.bytes(question.pictures[0])
            replies = [
                await client.post("/v1/chat/completions", json=body(question.text, data, model))
                for model in ("direct", "multi-agent", "single-agent", *ALONE)
            ]
            flow = await client.post(
                "/v1/chat/completions", json=body(question.text, data, "multi-agent", stream=True)
            )
            found.append((replies, flow))
        return found

    for (direct, thought, answer, final, unaided), (replies, flow) in zip(
        asyncio.run(alone()), serve(served), strict=True
    ):
        assert said(replies[0]) == {"role": "assistant", "content": direct.text}
        assert said(replies[1])["content"] == answer.text
        assert said(replies[1])["reasoning_content"] == thought.text
        usage = replies[1].json()["usage"]
        assert usage["completion_tokens"] == thought.tokens + answer.tokens
        assert usage["prompt_tokens"] > 64  # the picture is among them
        assert said(replies[2])["reasoning_content"]
        assert said(replies[3])["content"] == final.text
        assert said(replies[3])["reasoning_content"] == thought.text
        assert said(replies[4]) == {"role": "assistant", "content": unaided.text}
        joined, order = streamed(flow.text)
        assert joined["content"] == answer.text
        assert order.index("content") > order.index("reasoning_content")
        # Greedily the steps that come one by one are those of a single call.
        steps = parse_steps(joined["reasoning_content"]).steps
        assert steps == thought.steps and order.count("reasoning_content") == len(steps)


def test_both_agents_get_the_picture(asked):
    """Another picture, another reading: by either agent, in either mode."""
    questions, pictures = asked
    question = next(question for question in questions if question.benchmark == "reading")
    others = {name for other in questions for name in other.pictures} - {*question.pictures}

    async def scenario(client, held):
        found = {}
        for model in MODELS:
            for name in (question.pictures[0], sorted(others)[0]):
                asked = body(question.text, pictures.bytes(name), model)
                reply = said(await client.post("/v1/chat/completions", json=asked))
                found[model, name] = (reply.get("reasoning_content"), reply["content"])
        return found

    found = serve(scenario)
    for model in MODELS:
        one, two = (found[key] for key in found if key[0] == model)
        assert one != two


def test_both_agents_are_shown_every_picture_as_tokens(asked):
    """What each engine is asked, in every mode: the pictures, which its prompt then holds."""
    questions, pictures = asked
    question = questions[0]
    names = list(dict.fromkeys(name for other in questions for name in other.pictures))[:2]
    heard: dict[str, list] = {}

    class Heard:
        def __init__(self, role, held):
            self.engine, self.role = load_engine(TINY, HERE, held), role

        async def complete(self, request):
            there, bare = self.engine.count(request), replace(request, pictures=())
            heard.setdefault(self.role, []).append((request, there - self.engine.count(bare)))
            return await self.engine.complete(request)

        def __getattr__(self, name):
            return getattr(self.engine, name)

    async def whole():
        held = LentPictures()
        agents = Agents(lambda role: Heard(role, held), PROMPTS, ENTRY)
        transport = httpx2.ASGITransport(application(agents, held, KEY))
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://here", headers=headers
        ) as client:
            for model in MODELS:
                sent = body(question.text, pictures.bytes(names[0]), model, max_tokens=4)
                shown = {"type": "image_url", "image_url": {"url": url(pictures.bytes(names[1]))}}
                sent["messages"][0]["content"] += [shown, {"type": "text", "text": "Well?"}]
                said(await client.post("/v1/chat/completions", json=sent))
        await agents.close()

    asyncio.run(whole())
    assert {role: len(found) for role, found in heard.items()} == {
        "base": 3,  # directly, and reasoning in two turns
        "single": 1,
        "summary": 2,  # alone, and after the reasoning agent
        "reasoning": 1,
    }
    for request, tokens in itertools.chain(*heard.values()):
        assert request.pictures == tuple(names)
        assert tokens >= 2 * 64
        words = [message.text for message in request.messages if message.role == "user"]
        assert f"{question.text}\n(picture 2)\nWell?" in words[0]


def test_draws_follow_the_request(asked):
    async def scenario(client, held):
        texts = []
        for more in ({}, {"temperature": 3.0}, {"temperature": 3.0, "seed": 5}, {"max_tokens": 1}):
            asked = body("How many bars are there?", encoded(), **more)
            texts.append(said(await client.post("/v1/chat/completions", json=asked))["content"])
        again = body("How many bars are there?", encoded(), temperature=3.0, seed=5)
        texts.append(said(await client.post("/v1/chat/completions", json=again))["content"])
        return texts

    plain, warm, seeded, cut, again = serve(scenario)
    assert seeded == again and len({plain, warm, seeded}) > 1 and len(cut) <= len(plain)


def encoded(size=(64, 48)):
    packed = io.BytesIO()
    Image.new("RGB", size, "teal").save(packed, "PNG")
    return packed.getvalue()


def picture(value):
    part = {"type": "image_url", "image_url": {"url": value}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]


WRONG = [
    (b"{", "no JSON"),
    (b"[]", "no JSON object"),
    (body(model="gpt-9\x1b[31m"), "no model 'gpt-9\\x1b[31m'"),
    (body(model=["direct"]), "no model"),
    (body(tools=[{"x": 1}]), "tools is not to be had"),
    (body(n=2), "n is 1 here"),
    (body(temperature="hot"), "temperature must be a number"),
    (body(temperature=-1), "temperature must be a number"),
    (body(top_p=0), "top_p must be a number"),
    (body(max_tokens=0), "max_tokens must be a number"),
    (body(max_tokens=True), "max_tokens must be a number"),
    (body(" "), "ask something"),
    ({"model": "direct"}, "give a list of turns"),
    ({"model": "direct", "messages": [{"role": "root", "content": "x"}]}, "has a role"),
    ({"model": "direct", "messages": [{"role": "user", "content": 7}]}, "text or a list"),
    ({"model": "direct", "messages": [{"role": "user", "content": [7]}]}, "type text or image"),
    (
        {"model": "direct", "messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
        "must be the user's",
    ),
    ({"model": "direct", "messages": picture("http://10.0.0.1/x.png")}, "give the picture itself"),
    ({"model": "direct", "messages": picture("file:///etc/passwd")}, "give the picture itself"),
    ({"model": "direct", "messages": picture("data:image/png;base64,@@")}, "no base64"),
    ({"model": "direct", "messages": picture("data:image/png;base64,AAAA")}, "cannot be decoded"),
    ({"model": "direct", "messages": picture(url(encoded())) * 17}, "17 pictures"),
]


def test_what_cannot_be_served_is_told():
    async def scenario(client, held):
        for asked, wrong in WRONG:
            sent = {"content": asked} if isinstance(asked, bytes) else {"json": asked}
            reply = await client.post("/v1/chat/completions", **sent)
            assert reply.status_code == 400, (asked, reply.text)
            message = reply.json()["error"]["message"]
            assert wrong in message and message.isprintable()
        assert not held._held

    serve(scenario)


def test_nobody_is_answered_without_the_key():
    async def scenario(client, held):
        for headers in ({"authorization": ""}, {"authorization": KEY}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
            reply = await client.post("/v1/chat/completions", json=body(), headers=headers)
            assert reply.status_code == 401
        assert (await client.get("/health", headers={"authorization": ""})).status_code == 200
        listed = (await client.get("/v1/models")).json()["data"]
        return [model["id"] for model in listed]

    assert serve(scenario, ("direct", "multi-agent")) == ["direct", "multi-agent"]


def test_a_request_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("insightv.serving.endpoint.MOST_BYTES", 1000)

    async def scenario(client, held):
        return await client.post("/v1/chat/completions", json=body("x" * 2000))

    assert "more than 1,000 bytes" in serve(scenario).json()["error"]["message"]


def test_lent_pictures_are_held_as_long_as_they_are_shown():
    held, data = LentPictures(), encoded()
    one, two = held.lend(data), held.lend(data)
    assert one == two and held.bytes(one) == data and held.image(one).size == (64, 48)
    held.give_back(one)
    assert held.bytes(one) == data
    held.give_back(two)
    with pytest.raises(RecordError, match="not there any more"):
        held.bytes(one)


def test_keys_and_ports(tmp_path):
    path = tmp_path / "serve.key"
    key = _key(path)
    assert len(key) > 30 and path.stat().st_mode & 0o77 == 0 and _key(path) == key
    path.chmod(0o644)
    with pytest.raises(UserError, match="--key-file: others can read"):
        _key(path)
    with _listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be listened"):
            _listening("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot be listened"):
        _listening("127.0.0.1", 99999)
