import asyncio
import io
import random
import time

import pytest
import torch
from families import FAMILIES, picture, save_family

from hpc.errors import RecordError, UserError
from insightv import chats, models
from insightv.agents import MultiAgent, ReasoningAgent, SummaryAgent
from insightv.engines import EngineConfig, Request, Sampling, decoding, load_engine
from insightv.engines.decoding import Decoder
from insightv.engines.rows import RowSampler, RowStopper
from insightv.pictures import Pictures, PictureWriter
from insightv.prompting import load_prompts
from insightv.records import Message, Question


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    with PictureWriter(folder) as writer:
        for number in range(4):
            data = io.BytesIO()
            picture(number, 60 + 20 * number, 100 - 10 * number).save(data, "PNG")
            writer.add(data.getvalue())
        writer.add(b"this is no picture")
    return Pictures([folder])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_family(family, tmp_path_factory.mktemp("model")) for family in FAMILIES}


@pytest.fixture
def make(folders, pictures):
    """Loads an engine; closes all at the end."""
    made = []

    def load(family="llava", **config):
        config = EngineConfig(**{"device": "cpu", "threads": 1} | config)
        made.append(load_engine(folders[family], config, pictures))
        return made[-1]

    yield load
    for engine in made:
        asyncio.run(engine.close())


def request(pictures, text="What is the value of A?", number=0, seed=0, stop=(), **sampling):
    shown = (list(pictures)[number],) if number is not None else ()
    options = {"max_tokens": 12} | sampling
    return Request((Message("user", text),), shown, Sampling(**options), seed, stop)


def complete(engine, *requests):
    async def all_of_them():
        replies = (engine.complete(request) for request in requests)
        return await asyncio.gather(*replies, return_exceptions=True)

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rows_are_what_generate_gives(family, make, pictures):
    engine = make(family)
    texts = ["What is A?", "Which bar is the highest? Write one step at a time.", "Sum?"]
    limits = [3, 20, 9, 14, 6, 2]  # rows leave the batch one after the other
    requests = [
        request(pictures, texts[n % 3], n % 2, max_tokens=limit) for n, limit in enumerate(limits)
    ]
    requests.append(request(pictures, texts[0], 0, max_tokens=17))  # shares a prompt
    requests.append(request(pictures, texts[0], None, max_tokens=8))
    found = complete(engine, *requests)
    for asked, reply in zip(requests, found, strict=True):
        encoding = chats.encode(
            engine._processor, asked.messages, [pictures.image(p) for p in asked.pictures]
        )
        tokens = engine._model.generate(
            **chats.collate([encoding], 0),
            max_new_tokens=asked.sampling.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )[0, len(encoding.ids) :]
        assert reply.tokens == len(tokens)
        assert reply.text == engine._tokenizer.decode(tokens, skip_special_tokens=True)
        ended = tokens[-1] == engine._tokenizer.eos_token_id
        assert reply.finish == ("stop" if ended else "length")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_draws_are_its_own(family, make, pictures):
    engine = make(family)
    hot = {"temperature": 1.0, "top_p": 0.9}
    asked = request(pictures, seed=7, repetition_penalty=1.2, **hot)
    (alone,) = complete(engine, asked)
    others = [request(pictures, f"Other {n}?", n % 4, seed=n, **hot) for n in range(5)]
    crowd = complete(engine, *others, asked, request(pictures), request(pictures, seed=8, **hot))
    assert crowd[5] == alone
    assert crowd[7].text != alone.text
    assert complete(engine, request(pictures)) == [crowd[6]]  # greedy beside sampled rows


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_answered(family, make, pictures):
    engine = make(family)
    long = "Look at the picture and answer the question. What is the sum?"
    both = [request(pictures, number=None, max_tokens=9), request(pictures, long, None)]
    assert complete(engine, *both) == [complete(engine, asked)[0] for asked in both]


def test_every_picture_counts(make, pictures):
    engine = make()
    texts = {
        number: complete(engine, request(pictures, number=number))[0].text for number in range(4)
    }
    assert len(set(texts.values())) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_both_agents_really_see(family, make, pictures):
    """A changed picture changes what each agent says; the question and the words stay."""
    engine, prompts = make(family), load_prompts("tiny")
    sampling = Sampling(max_tokens=12)
    pair = MultiAgent(
        ReasoningAgent(engine, prompts, sampling), SummaryAgent(engine, prompts, sampling)
    )

    async def both():
        seen = []
        for shown in list(pictures)[:4]:
            question = Question("a:b:1", "What is A?", (shown,), "1", "number")
            thought, _ = await pair.answer(question)
            told = await pair.summary.answer(question, "A is 1.")
            plain = await pair.summary.answer(question, None)
            seen.append((thought.text, told.text, plain.text))
        return seen

    for words in zip(*asyncio.run(both()), strict=True):
        assert len(set(words)) > 1


def test_an_open_turn_is_gone_on_with(make, pictures):
    engine = make()
    whole = complete(engine, request(pictures, max_tokens=20))[0]
    asked = request(pictures)
    first = engine._tokenizer.encode(whole.text, add_special_tokens=False)
    half = engine._tokenizer.decode(first[:8])
    if engine._tokenizer.encode(half, add_special_tokens=False) != first[:8]:
        pytest.skip("the text does not give its tokens back")
    turns = (*asked.messages, Message("assistant", half))
    rest = complete(engine, Request(turns, asked.pictures, Sampling(max_tokens=12)))[0]
    assert half + rest.text == whole.text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_gone_on_with_as_if_read_anew(family, make, pictures):
    """Calls of a path, one behind the other; rows of different lengths are remembered."""
    engine, anew = make(family), make(family, batch_tokens=1, batch_size=1)
    widths = []
    engine._model.register_forward_pre_hook(
        lambda _, words, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    first = [request(pictures, f"What is {n}?", n, max_tokens=4 + 5 * (n or 0)) for n in (0, 1, 3)]
    first += [request(pictures, text, None, max_tokens=9) for text in ("Sum?", "What is the sum?")]
    hot = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 7}
    calls = first + [request(pictures, "What is 0?", 0, seed=n, **hot) for n in range(3)]
    for _ in range(3):
        widths.clear()
        replies = complete(engine, *calls)
        assert replies == [complete(anew, call)[0] for call in calls]
        assert not anew._decoder.prefixes.tokens
        calls = [
            Request(
                (*call.messages[:1], Message("assistant", f"{_written(call)}{reply.text}A")),
                *(call.pictures, call.sampling, call.seed + 10),
            )
            for call, reply in zip(calls, replies, strict=True)
        ]
    assert 2 * widths[0] < max(map(engine.count, calls)) and max(widths[1:]) == 1


def _written(call):
    return call.messages[1].text if len(call.messages) > 1 else ""


def test_nothing_is_remembered_when_nobody_comes_back(make, pictures, monkeypatch):
    room = []
    real = Decoder.run

    def watched(decoder, calls):
        found = real(decoder, calls)
        room.append((decoder.prefixes.tokens, decoder.prefixes._room))
        return found

    monkeypatch.setattr(Decoder, "run", watched)
    engine = make(batch_size=3, batch_tokens=2000)

    async def call_and_wait():
        await asyncio.gather(*(engine.complete(request(pictures, number=n)) for n in range(4)))
        held = engine._decoder.prefixes.tokens
        await asyncio.sleep(0.5)
        return held

    held = asyncio.run(call_and_wait())
    assert held == room[-1][0] > 0 and not engine._decoder.prefixes.tokens
    longest = engine.count(request(pictures, number=3)) + 12
    assert all(tokens <= most <= min(2000, 2 * 3 * longest) for tokens, most in room)


def test_batches_are_the_same_however_long_requests_take(make, pictures, monkeypatch):
    batches = []
    real = Decoder.run

    def watched(decoder, calls):
        batches.append([call.request.seed for call in calls])
        return real(decoder, calls)

    async def path(engine, number):
        for step in range(3):
            asked = request(pictures, "Why? " * number, number % 3, seed=10 * number + step)
            await engine.complete(asked)

    async def paths(engine):
        await asyncio.gather(*(path(engine, number) for number in range(7)))

    def run(draw):
        engine = make(batch_size=3)
        encode = engine._encode
        monkeypatch.setattr(
            engine, "_encode", lambda asked: time.sleep(draw.random() / 50) or encode(asked)
        )
        batches.clear()
        asyncio.run(paths(engine))
        return list(batches)

    monkeypatch.setattr(Decoder, "run", watched)
    first = run(random.Random(0))
    assert sum(map(len, first)) == 21 and run(random.Random(1)) == first


def test_stop_strings_end_and_are_left_out(make, pictures):
    engine = make()
    asked = {"temperature": 1.0, "max_tokens": 60, "seed": 3}
    free = complete(engine, request(pictures, **asked))[0]
    printable = [place for place, sign in enumerate(free.text) if sign.isprintable()]
    stop = free.text[printable[5] : printable[5] + 2]
    rows = [
        request(pictures, stop=(stop,), **asked),
        request(pictures, stop=("\0never", stop[-1]), **asked),
        request(pictures, **asked),
    ]
    two, one, none = complete(engine, *rows)
    assert two.text == free.text[: free.text.index(stop)] and two.finish == "stop"
    assert one.text == free.text[: free.text.index(stop[-1])] and one.finish == "stop"
    assert two.tokens < free.tokens and none == free


def test_what_cannot_be_served_fails_alone(make, pictures):
    engine = make(context=200)
    rows = [
        request(pictures),
        request(pictures, number=4),
        Request((Message("user", "?"),), ("0" * 64,), Sampling()),
        request(pictures, "long " * 300),
        request(pictures, max_tokens=10**6),
    ]
    good, broken, missing, long, clipped = complete(engine, *rows)
    assert good.text == complete(engine, rows[0])[0].text
    assert isinstance(broken, RecordError) and "cannot be decoded" in str(broken)
    assert isinstance(missing, RecordError) and "not in the store" in str(missing)
    assert isinstance(long, RecordError) and "context of 200" in str(long)
    assert clipped.tokens + engine.count(rows[4]) <= 200
    assert engine.count(rows[3]) > 200


@pytest.fixture
def turns(monkeypatch):
    """Of each turn of a model: how many rows were under way, how many came, and how many prompts
    of those were read."""
    found = []
    run, read = Decoder.run, decoding.read_prompts

    def watched(decoder, calls):
        going = int((~decoder._batch.stopper.ended()).sum()) if decoder._batch else 0
        found.append([going, len(calls), 0])
        return run(decoder, calls)

    def watched_read(model, prompts, *rest):
        found[-1][2] = len(prompts)
        return read(model, prompts, *rest)

    monkeypatch.setattr(Decoder, "run", watched)
    monkeypatch.setattr(decoding, "read_prompts", watched_read)
    return found


def test_batches_fill_and_respect_rows_and_tokens(make, pictures, turns):
    engine = make(batch_size=4)
    assert engine.concurrency == 8
    limits = [40, 3, 40, 5, 20, 1, 30, 2, 10]
    asked = [
        request(pictures, seed=n, temperature=1.0, max_tokens=limit)
        for n, limit in enumerate(limits)
    ]
    replies = complete(engine, *asked)
    assert all(reply.tokens <= limit for reply, limit in zip(replies, limits, strict=True))
    assert sum(new for _, new, _ in turns) == 9 and turns[0] == [0, 4, 1]
    assert max(going + new for going, new, _ in turns) == 4
    assert any(going and new for going, new, _ in turns)  # who is done makes place for another
    assert {read for _, new, read in turns if new} == {1}  # once for all rows
    turns.clear()
    length = engine.count(request(pictures)) + 12
    complete(make(batch_tokens=2 * length), *(request(pictures) for _ in range(5)))
    assert max(going + new for going, new, _ in turns) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_come_and_go_without_a_trace(family, make, pictures, turns):
    """Rows of many lengths, drawn in many ways: each is the one it is alone."""
    asked = [
        request(
            pictures,
            "Why? " * (1 + n % 5),
            None if n % 7 == 3 else n % 3,
            n,
            ("e",) if n % 4 == 1 else (),
            max_tokens=2 + 11 * n % 29,
            temperature=n % 3 / 2,
            repetition_penalty=1.0 + (n % 5 == 2) / 2,
        )
        for n in range(14)
    ]
    alone = make(family, batch_size=1)
    expected = [complete(alone, each)[0] for each in asked]
    turns.clear()
    assert complete(make(family, batch_size=5), *asked) == expected
    assert any(going and new for going, new, _ in turns)


def test_a_model_that_forgets_takes_nobody_in(make, pictures, turns, monkeypatch):
    """Rows of layers with a window cannot be joined: a batch runs to its end."""
    asked = [request(pictures, seed=n, temperature=1.0, max_tokens=3 + 5 * n) for n in range(6)]
    expected = complete(make(), *asked)
    monkeypatch.setattr(decoding.states, "keeps_all", lambda cache: False)
    engine = make(batch_size=4)
    turns.clear()
    assert complete(engine, *asked) == expected
    assert not any(going and new for going, new, _ in turns)


def test_without_memory_batches_are_halved(make, pictures, monkeypatch):
    real, sizes = Decoder.run, []

    def short(decoder, calls):
        found = real(decoder, calls)
        going = len(found) + (len(decoder._batch.calls) if decoder._batch else 0)
        sizes.append(going)
        long = any("word " * 9 in engine._tokenizer.decode(call.encoding.ids) for call in calls)
        if going > 2 or long:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    engine = make()
    rows = [request(pictures, seed=n, temperature=1.0) for n in range(7)]
    expected = complete(engine, *rows)
    monkeypatch.setattr(Decoder, "run", short)
    assert complete(engine, *rows) == expected
    assert sizes[0] == 7 and max(sizes[-1:]) <= 2
    sizes.clear()
    assert complete(engine, *rows) == expected and max(sizes) < 4  # it has learned
    (failed,) = complete(engine, request(pictures, "word " * 10))
    assert isinstance(failed, RecordError) and "out of memory with one row" in str(failed)


def test_a_fault_of_the_model_is_no_record_error(make, pictures, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    engine = make()
    monkeypatch.setattr(Decoder, "run", broken)
    found = complete(engine, request(pictures), request(pictures))
    assert [type(error) for error in found] == [ValueError] * 2
    monkeypatch.undo()
    assert complete(engine, request(pictures))[0].tokens  # and the engine is still there


def test_the_event_loop_lives_and_callers_may_leave(make, pictures, monkeypatch):
    real = Decoder.run

    def slow(*rest):
        time.sleep(0.3)
        return real(*rest)

    monkeypatch.setattr(Decoder, "run", slow)
    engine = make(batch_size=2)

    async def watch():
        calls = [asyncio.create_task(engine.complete(request(pictures))) for _ in range(4)]
        turns = 0
        while not calls[0].done():
            await asyncio.sleep(0.01)
            turns += 1
            if turns == 10:
                calls[1].cancel()
                calls[3].cancel()
        await calls[2]
        return turns

    assert asyncio.run(watch()) >= 10


def test_a_picture_is_encoded_once(make, pictures, monkeypatch):
    seen = []
    real = chats.encode_picture
    monkeypatch.setattr(
        chats, "encode_picture", lambda p, image: seen.append(image.size) or real(p, image)
    )
    engine = make()
    complete(engine, *(request(pictures, number=n % 2, seed=n) for n in range(8)))
    assert len(seen) == 2
    seen.clear()
    engine = make(cache_mb=0)  # room for none: every request encodes again
    for _ in range(2):
        complete(engine, request(pictures))
    assert len(seen) == 2 and engine._cache._size == 0 and not engine._cache._entries


def test_autocast_runs(make, pictures):
    assert complete(make(autocast=True), request(pictures))[0].tokens
    assert complete(make(dtype="bfloat16"), request(pictures))[0].tokens


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (EngineConfig(kind="magic"), "engine.kind is 'magic'"),
        (EngineConfig(batch_size=0), "engine.batch_size is 0"),
        (EngineConfig(threads=-1), "engine.threads is -1"),
    ],
)
def test_impossible_values_are_told(config, told, folders, pictures):
    with pytest.raises(UserError, match=told):
        load_engine(folders["llava"], config, pictures)


def sampler(rows, logits, limit=1, prompts=None, mask=None):
    prompts = torch.zeros(len(rows), 1, dtype=torch.long) if prompts is None else prompts
    mask = torch.ones_like(prompts) if mask is None else mask
    requests = [Request((), (), Sampling(**sampling), seed) for seed, sampling in enumerate(rows)]
    return RowSampler(requests, [limit] * len(rows), prompts, mask)(logits.clone())


def test_draws_follow_the_nucleus():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 4000
    logits = probabilities.log().expand(count, 4)

    def shares(**sampling):
        drawn = sampler([sampling] * count, logits)
        return torch.bincount(drawn, minlength=4) / count

    close = {"atol": 0.035, "rtol": 0}
    assert torch.allclose(shares(temperature=1.0), probabilities, **close)
    nucleus = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert torch.allclose(shares(temperature=1.0, top_p=0.9), nucleus, **close)
    assert shares(temperature=1.0, top_p=0.4).tolist() == [1, 0, 0, 0]
    cooler = probabilities**2 / (probabilities**2).sum()
    assert torch.allclose(shares(temperature=0.5), cooler, **close)
    assert shares().tolist() == [1, 0, 0, 0]


def test_wide_distributions_are_drawn_whole():
    count, size = 3000, 500  # far more than are sorted at first
    drawn = sampler([{"temperature": 1.0}] * count, torch.zeros(count, size))
    assert drawn.unique().numel() > 0.95 * size
    nucleus = sampler([{"temperature": 1.0, "top_p": 0.5}] * count, torch.zeros(count, size))
    assert 0.4 * size < nucleus.unique().numel() <= 0.52 * size


def test_repetition_is_penalised_but_not_padding():
    logits = torch.tensor([[2.0, 1.9, 0.0], [2.0, 1.9, 0.0], [2.0, 1.9, 0.0]])
    prompts, mask = torch.tensor([[0], [0], [0]]), torch.tensor([[1], [0], [1]])
    rows = [{"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}, {}]
    assert sampler(rows, logits, prompts=prompts, mask=mask).tolist() == [1, 0, 0]
    negative = torch.tensor([[-1.0, -1.2, -9.0]])
    assert sampler(rows[:1], negative, prompts=prompts[:1], mask=mask[:1]).tolist() == [1]


def test_stops_are_found_across_tokens_and_characters(folders):
    tokenizer = models.load(folders["llava"], "cpu").tokenizer
    rows = [("→",), ("ab→",), ("b c",), (), (" ",)]
    requests = [Request((), (), Sampling(), stop=stop) for stop in rows]
    ids = tokenizer.encode("xab→b c d", add_special_tokens=False)
    stopper = RowStopper(requests, [50] * 5, tokenizer, [], torch.device("cpu"))
    for token in ids:
        stopper(torch.full((5,), token))
    assert stopper.ended().tolist() == [True, True, True, False, True]
    texts = [tokenizer.decode(stopper.reply(row)) for row in range(5)]
    assert texts[0] == texts[1] == "xab→" and texts[2].startswith("xab→b c")
    assert texts[4].startswith("xab→b ")
