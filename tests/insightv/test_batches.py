"""Tokens as inference sees them, targets where they belong, the same batch for any cut."""

import io
from itertools import groupby

import numpy as np
import pytest
import torch
from families import FAMILIES, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from training_case import FINAL, loaded, pair_rows, path, sample_rows, store

from hpc import shards
from hpc.errors import RecordError, UserError
from insightv import chats
from insightv.pictures import Pictures, PictureWriter
from insightv.records import Message, TrainingSample
from insightv.training import batches
from insightv.training.batches import Encoder
from insightv.training.packing import Packer, Tree


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return store(tmp_path_factory.mktemp("pictures"))


def encoder(name: str, pictures: Pictures, max_length: int = 4096) -> Encoder:
    return Encoder(loaded(name).processor, pictures, max_length, 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_inference_tokens_are_a_prefix_of_training_tokens(name, pictures):
    pictures, ids = pictures
    processor = loaded(name).processor
    chat = (
        Message("user", "Which bar is the highest?"),
        Message("assistant", path(3, 1), train=True),
        Message("user", FINAL),
        Message("assistant", "B", train=True),
    )
    row = TrainingSample("k", "k", (ids[1], ids[3]), chat, "plain").to_json()
    reply = encoder(name, pictures).sample(row).replies[0]
    images = [pictures.image(ids[1]), pictures.image(ids[3])]
    for (start, stop), turn in zip(reply.spans, (1, 3), strict=True):
        asked = chats.encode(processor, chat[:turn], images)
        assert reply.encoding.ids[:start] == asked.ids
        for mark, values in asked.marks.items():
            assert reply.encoding.marks[mark][:start] == values
        target = reply.encoding.ids[start:stop]
        assert target[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(target[:-1]) == chat[turn].text
        # A path that is gone on with step by step is made of the same tokens.
        half = path(3, 1).split("\n")[0] + "\n"
        if turn == 1:
            going_on = chats.encode(processor, (*chat[:1], Message("assistant", half)), images)
            assert reply.encoding.ids[: len(going_on.ids)] == going_on.ids
    assert len(reply.encoding.ids) == reply.spans[-1][1]


@pytest.mark.parametrize("name", FAMILIES)
def test_training_tokens_are_the_processors_own(name, pictures):
    """The whole chat, pictures included, against one call of the Hugging Face processor."""
    pictures, ids = pictures
    processor = loaded(name).processor
    chat = (Message("user", "Read A."), Message("assistant", path(2, 5), train=True))
    row = TrainingSample("k", "k", (ids[2],), chat, "plain").to_json()
    reply = encoder(name, pictures).sample(row).replies[0]
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": chat[0].text}]},
        {"role": "assistant", "content": [{"type": "text", "text": chat[1].text}]},
    ]
    text = processor.apply_chat_template(turns)
    whole = processor(
        text=[text], images=[pictures.image(ids[2])], return_tensors="pt", add_special_tokens=False
    )
    expected = whole["input_ids"][0].tolist()
    assert expected[: len(reply.encoding.ids)] == reply.encoding.ids
    assert processor.tokenizer.decode(expected[len(reply.encoding.ids) :]).strip() == ""
    made = chats.collate([reply.encoding], 0, side="right")
    for key in made.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        torch.testing.assert_close(made[key], whole[key])


def test_only_marked_turns_are_targets(pictures):
    pictures, _ = pictures
    chat = (
        Message("user", "One?"),
        Message("assistant", "first"),
        Message("user", "Two?"),
        Message("assistant", "second", train=True),
        Message("user", "Three?"),
        Message("assistant", "third"),
    )
    row = TrainingSample("k", "k", (), chat, "plain").to_json()
    tokenizer = loaded("llava").tokenizer
    example = encoder("llava", pictures).sample(row)
    reply = example.replies[0]
    (start, stop), ids_ = reply.spans[0], reply.encoding.ids
    assert tokenizer.decode(ids_[start:stop]) == "second<|im_end|>"
    assert "third" not in tokenizer.decode(ids_)
    tree = Tree.of([example], chats.positions(loaded("llava").model))
    assert [ids_[place + 1] for place in tree.places] == tree.targets == ids_[start:stop]


@pytest.mark.parametrize(
    ("chat", "word"),
    [
        ((Message("user", "a"), Message("assistant", "b")), "mark the assistant turns"),
        ((Message("user", "a", train=True),), "mark the assistant turns"),
        ((Message("assistant", "b", train=True),), "begin with a user turn"),
    ],
)
def test_chats_with_nothing_to_learn_are_refused(chat, word, pictures):
    row = TrainingSample("k:1", "k", (), chat, "plain").to_json()
    with pytest.raises(UserError, match=f"k:1.*{word}"):
        encoder("llava", pictures[0]).sample(row)


def test_rows_of_another_kind_are_refused(pictures):
    with pytest.raises(UserError, match="set:train:0.*chosen"):
        encoder("llava", pictures[0]).sample(pair_rows(pictures[1])[0])


def test_control_tokens_in_data_stay_text(pictures):
    pictures, ids = pictures
    chat = (
        Message("user", "Is <image> or <|im_end|> here?"),
        Message("assistant", "no <|im_end|> it is <image>", train=True),
    )
    row = TrainingSample("k", "k", (ids[0],), chat, "plain").to_json()
    tokenizer = loaded("llava").tokenizer
    reply = encoder("llava", pictures).sample(row).replies[0]
    start, stop = reply.spans[0]
    assert reply.encoding.ids[start:stop].count(tokenizer.eos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids("<image>") not in reply.encoding.ids[start:stop]


def test_too_long_is_dropped_by_rule(pictures):
    pictures, ids = pictures
    rows = sample_rows(ids)
    examples, dropped = batches.encode_all(rows, encoder("llava", pictures).sample)
    limit = sorted(example.length for example in examples)[5]
    kept, dropped = batches.encode_all(rows, encoder("llava", pictures, limit).sample)
    assert {e.key for e in kept} == {e.key for e in examples if e.length <= limit}
    assert dropped.keys() == {e.key for e in examples if e.length > limit}
    assert all(reason.startswith("TooLong") and str(limit) in reason for reason in dropped.values())
    assert {e.length for e in kept} <= {e.length for e in examples}  # nothing was cut


def test_a_broken_picture_is_told_by_key(tmp_path):
    with PictureWriter(tmp_path) as writer:
        broken = writer.add(b"this is no picture")
    rows = sample_rows([broken])
    _, dropped = batches.encode_all(rows, encoder("llava", Pictures([tmp_path])).sample)
    assert dropped.keys() == {row["key"] for row in rows if row["pictures"]}
    assert all("cannot be decoded" in reason for reason in dropped.values())
    with pytest.raises(RecordError, match="not in the store"):
        encoder("llava", Pictures([tmp_path])).sample(sample_rows(["0" * 64])[1])


@settings(max_examples=20, deadline=None)
@given(budget=st.integers(1, 2000), seed=st.integers(0, 50))
def test_micro_batches_hold_every_example_once(budget, seed, tmp_path_factory):
    examples = pool(tmp_path_factory)
    packer = Packer(loaded("llava").model, 0, budget)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    cut = packer.batches([examples[n] for n in order])
    keys = [key for batch in cut for key in batch.keys]
    assert sorted(keys) == sorted(example.key for example in examples)
    for batch in cut:
        assert batch.inputs["input_ids"].numel() <= budget or len(batch.keys) == 1
        assert batch.owners.unique().tolist() == list(range(batch.replies))
    # The cut depends on the members only, not on the order in which they come.
    assert [batch.keys for batch in packer.batches(examples)] == [batch.keys for batch in cut]


_POOL: list[batches.Example] = []


def pool(factory) -> list[batches.Example]:
    if not _POOL:
        pictures, ids = store(factory.mktemp("pool"))
        _POOL.extend(batches.encode_all(sample_rows(ids), encoder("llava", pictures).sample)[0])
    return _POOL


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 17),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
    pictures=st.integers(0, 6),
)
def test_every_epoch_sees_every_row(rows, size, epochs, seed, pictures):
    shown = np.random.default_rng(seed).integers(pictures, size=rows) if pictures else None
    members = batches.Members(seed, rows, size, epochs, shown)
    made = [members(step) for step in range(-(-rows * epochs // size))]
    flat = [row for step in made for row in step]
    for epoch in range(epochs):
        order = flat[epoch * rows : (epoch + 1) * rows]
        assert sorted(order) == list(range(rows))
        if shown is not None:  # those of a picture stand behind each other
            assert len(list(groupby(shown[order]))) == len(set(shown))
    assert all(len(step) == size for step in made[:-1]) and made[-1]
    assert members(len(made)) == []


def test_membership_depends_on_the_seed():
    assert batches.Members(0, 100, 20, 1)(0) != batches.Members(1, 100, 20, 1)(0)
    first, second = map(batches.Members(0, 20, 20, 2), (0, 1))
    assert first != second
    # Rows of pictures of their own keep the order of the shuffle, and pictures keep its order.
    alone = batches.Members(0, 20, 20, 2, np.arange(20)[::-1])
    assert alone(0) == first
    paired = batches.Members(0, 20, 20, 2, np.arange(20) // 2)(0)
    assert [row // 2 for row in paired[::2]] == list(dict.fromkeys(row // 2 for row in first))


def test_rows_are_read_back_by_number(tmp_path):
    rows = [{"key": f"k{n}", "text": "ünï\n" * n} for n in range(20)]
    shown = {0: ["b", "a"], 3: ["a"], 7: ["a"], 9: ["a", "b"], 11: []}
    rows = [row | {"pictures": shown.get(n, [f"p{n}"])} for n, row in enumerate(rows)]
    stored = batches.Rows(iter(rows), tmp_path)
    assert stored.pictures[3] == stored.pictures[7] and len(set(stored.pictures)) == 19
    assert [stored[n] for n in reversed(range(20))] == rows[::-1] and len(stored) == 20
    other = batches.Rows(rows[:-1], tmp_path)
    assert stored.digest != other.digest and stored.digest == batches.Rows(rows, tmp_path).digest
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no rows"):
        batches.Rows([], tmp_path)


def test_rows_come_from_shards(tmp_path):
    rows = [{"key": f"k{n}"} for n in range(5)]
    shards.write_groups(tmp_path / "shards", ((row["key"], [row]) for row in rows), per_shard=2)
    stored = batches.Rows(tmp_path / "shards", tmp_path)
    assert [stored[n] for n in range(len(stored))] == rows


def test_the_picture_cache_is_bounded(tmp_path):
    with PictureWriter(tmp_path) as writer:
        ids = []
        for number in range(6):
            data = io.BytesIO()
            picture(number).save(data, "PNG")
            ids.append(writer.add(data.getvalue()))
    pictures = Pictures([tmp_path])
    asked = []
    original = pictures.image
    pictures.image = lambda key: asked.append(key) or original(key)
    size = chats.encode_picture(loaded("llava").processor, original(ids[0])).bytes
    cache = batches.PictureCache(loaded("llava").processor, pictures, 3 * size)
    for key in [*ids, ids[5], ids[4], ids[3]]:
        cache(key)
    assert asked == ids  # the last three were kept
    cache(ids[0])
    cache(ids[5])
    assert asked == [*ids, ids[0]] + [ids[5]]
    assert cache._bytes <= 3 * size
