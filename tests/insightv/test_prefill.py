"""What several prompts begin with is read once, and nothing else changes."""

import asyncio
import io

import pytest
from families import FAMILIES, picture, save_family
from hypothesis import given, settings
from hypothesis import strategies as st

from insightv.chats import EncodedPicture, Encoding
from insightv.engines import EngineConfig, Request, Sampling, load_engine
from insightv.engines.prefill import _heads
from insightv.pictures import Pictures, PictureWriter
from insightv.records import Message

SHOWN = [EncodedPicture([9] * 4, {}, {}) for _ in range(2)]


@given(
    st.lists(
        st.tuples(st.sampled_from([None, 0, 1]), st.lists(st.integers(0, 2), min_size=1)),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=300, deadline=None)
def test_heads_are_what_their_prompts_begin_with(drawn):
    prompts = [
        Encoding(ids, {"kind": list(range(len(ids)))}, ())
        if shown is None
        else Encoding([5, *[9] * 4, *ids], {}, (SHOWN[shown],), 5)
        for shown, ids in drawn
    ]
    heads, owners = _heads(prompts)
    assert sorted(set(owners)) == list(range(len(heads)))
    for prompt, owner in zip(prompts, owners, strict=True):
        head = heads[owner]
        assert len(head.ids) < len(prompt.ids)  # something is left to go on from
        assert prompt.ids[: len(head.ids)] == head.ids
        assert len(head.ids) >= prompt.opening and head.pictures == prompt.pictures
        assert all(len(values) == len(head.ids) for values in head.marks.values())


def test_prompts_that_differ_early_have_no_head_together():
    one, other = Encoding([1, 2, 3, 4, 5, 6], {}, ()), Encoding([1, 2, 8, 8, 8, 8], {}, ())
    near = Encoding([1, 2, 3, 4, 7], {}, ())
    heads, owners = _heads([one, other, near])
    assert owners[0] == owners[2] != owners[1]
    assert [len(head.ids) for head in heads] == [4, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_of_a_question_are_read_together(family, tmp_path):
    with PictureWriter(tmp_path / "pictures") as writer:
        for number in range(2):
            data = io.BytesIO()
            picture(number, 80 + 40 * number, 90).save(data, "PNG")
            writer.add(data.getvalue())
    pictures = Pictures([tmp_path / "pictures"])
    engine = load_engine(
        save_family(family, tmp_path / "model"), EngineConfig(device="cpu", threads=1), pictures
    )
    written = ["", "The bar", "The highest bar is B", "One step", "One step at a time. "]
    asked = [
        Request(
            (Message("user", f"Which bar is the highest, {name[:4]}?"), Message("assistant", text)),
            *((name,), Sampling(repetition_penalty=1.1, max_tokens=9)),
        )
        for text in written
        for name in pictures
    ]
    seen = []
    engine._model.register_forward_pre_hook(
        lambda _, words, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )

    async def both():
        alone = [await engine.complete(request) for request in asked]
        engine._decoder.prefixes.clear()
        seen.clear()
        together = await asyncio.gather(*map(engine.complete, asked))
        once = len(seen)
        again = await asyncio.gather(*map(engine.complete, asked))
        await engine.close()
        return alone, together, again, once

    alone, together, again, once = asyncio.run(both())
    assert together == alone == again
    heads, prompts = seen[:2]
    assert heads[0] == 2 and prompts[0] == 10 and prompts[1] < heads[1]
    assert seen[once][0] == 10 and seen[once][1] <= 4  # nearly all is known
