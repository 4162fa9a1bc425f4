"""DPO: from reference values to a trained policy, and what it refuses."""

import asyncio
import math
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from training_case import Here, family, pair_rows, store

from hpc.errors import UserError
from insightv import models
from insightv.training.config import DPOConfig, ReferenceConfig
from insightv.training.reference import Reference
from insightv.training.trainer import train_dpo


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return store(tmp_path_factory.mktemp("pictures"))


def config(**values) -> DPOConfig:
    plain = {"precision": "fp32", "device": "cpu", "learning_rate": 1e-3, "batch_size": 4}
    return DPOConfig(**{**plain, **values})


def referred(folder: Path, rows: list, pictures, **values) -> tuple[list, str]:
    settings = ReferenceConfig(**{"precision": "fp32", "device": "cpu", **values})
    reference = Reference(folder, settings, pictures)

    async def run():
        try:
            return await reference("all", {"pairs": rows})
        finally:
            await reference.close()

    return asyncio.run(run()), reference.digest


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_loss_is_log_two(name, pictures, tmp_path):
    """The policy is its reference at step 0, through both of the project's code paths."""
    store_, ids = pictures
    rows, digest = referred(family(name), pair_rows(ids), store_)
    context = Here(tmp_path / "stage")
    settings = config(terms={"sigmoid": 1.0}, batch_size=6, tokens_per_micro_batch=400)
    train_dpo(settings, family(name), rows, store_, tmp_path / "m", context, digest)
    first = context.lines()[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    # Six pictures and questions went through the model once, not twice.
    assert 0.25 * first["tokens"] < first["shared_tokens"] < first["tokens"]
    assert 0.6 < first["packing_efficiency"] <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_prefers_the_winners(name, pictures, tmp_path):
    store_, ids = pictures
    rows, digest = referred(family(name), pair_rows(ids), store_)
    context = Here(tmp_path / "stage")
    settings = config(epochs=20, learning_rate=3e-3, batch_size=6)
    counts = train_dpo(settings, family(name), rows, store_, tmp_path / "m", context, digest)
    lines = context.lines()
    assert counts["step"] == len(lines) == 20 and counts["samples"] == 120
    assert lines[-1]["accuracy"] == 1.0 and lines[-1]["margin"] > 0.5
    assert lines[-1]["reward_chosen"] > lines[-1]["reward_rejected"]
    assert {"logp_chosen", "logp_rejected", "both_falling", "length_chosen"} <= lines[0].keys()
    # The trained folder, scored anew: its margin is that of the policy, not of the log.
    after, _ = referred(tmp_path / "m", pair_rows(ids), store_)
    won = [a["reference_chosen"] - b["reference_chosen"] for a, b in zip(after, rows, strict=True)]
    lost = [
        a["reference_rejected"] - b["reference_rejected"] for a, b in zip(after, rows, strict=True)
    ]
    assert all(w > r for w, r in zip(won, lost, strict=True))


def test_shared_pictures_change_the_cost_only(pictures, tmp_path):
    """Three pairs of each of two questions, from the reference to the policy."""
    store_, ids = pictures
    told, values = [], []
    made = pair_rows(ids[:2])
    made = [row | {"prompt": made[number % 2]["prompt"]} for number, row in enumerate(made)]
    for share in (False, True):
        rows, digest = referred(family("llava"), made, store_, share_pictures=share)
        values.append([row["reference_chosen"] for row in rows])
        context = Here(tmp_path / f"{share}")
        settings = config(epochs=4, batch_size=6, share_pictures=share)
        train_dpo(settings, family("llava"), rows, store_, tmp_path / f"m{share}", context, digest)
        told.append(context.lines())
    assert values[1] == pytest.approx(values[0], abs=1e-3)
    for one, other in zip(*told, strict=True):
        for name in ("loss", "margin", "logp_rejected", "kl"):
            assert other[name] == pytest.approx(one[name], abs=1e-3), name
        assert other["samples"] == one["samples"] == 6
        assert other["tokens"] < 0.8 * one["tokens"]


def test_bf16_begins_near_log_two(pictures, tmp_path):
    store_, ids = pictures
    rows, digest = referred(family("llava"), pair_rows(ids), store_, precision="bf16")
    context = Here(tmp_path)
    settings = config(terms={"sigmoid": 1.0}, precision="bf16", batch_size=6)
    train_dpo(settings, family("llava"), rows, store_, tmp_path / "m", context, digest)
    assert context.lines()[0]["loss"] == pytest.approx(math.log(2), abs=0.01)


def test_pairs_without_reference_are_refused(pictures, tmp_path):
    store_, ids = pictures
    with pytest.raises(UserError, match="set:train:.*run the reference stage"):
        train_dpo(
            config(), family("llava"), pair_rows(ids), store_, tmp_path / "m", Here(tmp_path), "x"
        )


def test_values_of_another_reference_are_refused(pictures, tmp_path):
    store_, ids = pictures
    rows, digest = referred(family("llava"), pair_rows(ids), store_)
    other = models.digest_of(family("llava", 1))
    assert other != digest
    with pytest.raises(UserError, match=f"of model {digest}, expected {other}"):
        train_dpo(config(), family("llava"), rows, store_, tmp_path / "m", Here(tmp_path), other)
    # One row is enough, and it is found before the first step.
    rows[-1]["reference_model"] = ""
    context = Here(tmp_path)
    with pytest.raises(UserError, match=f"of model unknown, expected {digest}"):
        train_dpo(
            config(batch_size=1), family("llava"), rows, store_, tmp_path / "m", context, digest
        )
    assert context.seen == []


def test_a_pair_too_long_for_both_is_dropped_and_counted(pictures, tmp_path):
    store_, ids = pictures
    rows = pair_rows(ids)
    rows[2]["prompt"][0]["text"] *= 60
    rows, digest = referred(family("llava"), rows, store_, max_length=200)
    context = Here(tmp_path)
    counts = train_dpo(
        config(max_length=200),
        *(family("llava"), rows, store_, tmp_path / "m", context, digest),
    )
    assert counts["dropped_too_long"] == 1 and counts["samples"] == len(rows) - 1
    with pytest.raises(UserError, match="run the reference stage"):
        train_dpo(config(), family("llava"), rows, store_, tmp_path / "n", context, digest)


def test_a_reference_value_that_is_no_number_is_found(pictures, tmp_path):
    store_, ids = pictures
    rows, digest = referred(family("llava"), pair_rows(ids), store_)
    rows[4]["reference_rejected"] = float("nan")
    context = Here(tmp_path)
    counts = train_dpo(config(), family("llava"), rows, store_, tmp_path / "m", context, digest)
    assert counts["skipped"] == 1
    assert [line["skipped"] for line in context.lines() if "skipped" in line] == [[rows[4]["key"]]]
    weights = models.load(tmp_path / "m", "cpu").model.get_output_embeddings().weight
    assert torch.isfinite(weights).all()
