"""Reference log-probabilities: those of the model itself, whatever they were batched with."""

import asyncio

import pytest
import torch
from families import FAMILIES
from training_case import family, loaded, pair_rows, store

from hpc.errors import RecordError, UserError
from insightv import chats
from insightv.records import Message, PreferencePair
from insightv.training import policy as room
from insightv.training.config import ReferenceConfig
from insightv.training.reference import Reference


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return store(tmp_path_factory.mktemp("pictures"))


def config(**values) -> ReferenceConfig:
    return ReferenceConfig(**{"precision": "fp32", "device": "cpu", **values})


def filled(reference: Reference, groups: dict[str, list]) -> dict[str, object]:
    """The outputs of many questions asked for at once, exceptions among them."""

    async def run():
        calls = (reference(key, {"pairs": rows}) for key, rows in groups.items())
        try:
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await reference.close()

    return dict(zip(groups, asyncio.run(run()), strict=True))


def by_hand(name: str, row: dict, text: str, pictures) -> float:
    """Sum of log-probabilities from whole logits of one unpadded sequence."""
    model, processor = loaded(name).model, loaded(name).processor
    images = [pictures.image(key) for key in row["pictures"]]
    prompt = tuple(Message(**turn) for turn in row["prompt"])
    start = len(chats.encode(processor, prompt, images).ids)
    encoding = chats.encode(processor, (*prompt, Message("assistant", text)), images)
    encoding.ids.append(processor.tokenizer.eos_token_id)
    for values in encoding.marks.values():
        values.append(0)
    with torch.no_grad():
        logits = model(**chats.collate([encoding], 0)).logits[0].log_softmax(-1)
    return sum(
        logits[place - 1, encoding.ids[place]].item() for place in range(start, len(encoding.ids))
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_values_are_the_models_own(name, pictures):
    store_, ids = pictures
    rows = pair_rows(ids)
    groups = {"a": rows[:3], "b": rows[3:4], "c": [], "d": rows[4:]}
    out = filled(Reference(family(name), config(tokens_per_batch=700), store_), groups)
    for key, wanted in groups.items():
        assert [row["key"] for row in out[key]] == [row["key"] for row in wanted]
        for got, row in zip(out[key], wanted, strict=True):
            for side in ("chosen", "rejected"):
                want = by_hand(name, row, row[side], store_)
                assert got[f"reference_{side}"] == pytest.approx(want, abs=1e-3, rel=1e-5)
            assert got["reference_model"] == loaded(name).digest
            pair = PreferencePair.from_json(got)
            assert {**pair.to_json(), "prompt": row["prompt"]}["chosen"] == row["chosen"]
    # Nothing but the three fields has changed, and the input rows are as they were.
    changed = {k for k in rows[0] if rows[0][k] != out["a"][0][k]}
    assert changed <= {"reference_chosen", "reference_rejected", "reference_model"} | {
        "prompt",
        "pictures",
    }
    assert rows[0]["reference_chosen"] is None


def test_questions_in_flight_share_batches(pictures, monkeypatch):
    store_, ids = pictures
    calls = []
    original = room.token_logps
    monkeypatch.setattr(
        room,
        "token_logps",
        lambda model, batch, most: calls.append(batch) or original(model, batch),
    )
    groups = {str(n): [row] for n, row in enumerate(pair_rows(ids, 12))}
    filled(Reference(family("llava"), config(), store_), groups)
    assert sum(len(batch.keys) for batch in calls) == 12
    assert len(calls) < 12 and max(len(batch.keys) for batch in calls) > 3


def test_a_broken_picture_fails_its_question_only(pictures):
    store_, ids = pictures
    rows = pair_rows(ids)
    bad = [{**rows[0], "pictures": ["e" * 64]}]
    out = filled(Reference(family("llava"), config(), store_), {"good": rows[1:3], "bad": bad})
    assert isinstance(out["bad"], RecordError) and "not in the store" in str(out["bad"])
    assert all(row["reference_chosen"] is not None for row in out["good"])


def test_a_pair_too_long_is_passed_on(pictures):
    store_, ids = pictures
    rows = pair_rows(ids)
    rows[1]["prompt"][0]["text"] *= 60
    limited = Reference(family("llava"), config(max_length=200), store_)
    out = filled(limited, {"q": rows})["q"]
    assert out[1] == rows[1] and out[1]["reference_model"] == ""
    assert all(row["reference_chosen"] is not None for row in [out[0], *out[2:]])


def test_a_model_that_fails_fails_every_waiting_call(pictures, monkeypatch):
    store_, ids = pictures

    def fail(model, batch, most):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(room, "token_logps", fail)
    groups = {str(n): [row] for n, row in enumerate(pair_rows(ids))}
    out = filled(Reference(family("llava"), config(), store_), groups)
    assert all(isinstance(value, RuntimeError) for value in out.values())


def test_wrong_settings_are_refused(pictures, tmp_path):
    with pytest.raises(UserError, match="tokens_per_batch"):
        Reference(family("llava"), config(tokens_per_batch=0), pictures[0])
    with pytest.raises(UserError, match="no model folder"):
        Reference(tmp_path / "none", config(), pictures[0])
