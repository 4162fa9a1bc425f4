"""SFT: the loss of Hugging Face, the same for any micro-batches, and whole trainings."""

import json
from statistics import median

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from training_case import Here, family, sample_rows, store

from hpc.errors import UserError
from insightv import chats, models
from insightv.training import policy
from insightv.training.batches import Encoder, encode_all
from insightv.training.config import SFTConfig
from insightv.training.objectives import Supervised, Totals
from insightv.training.packing import Batch, Packer
from insightv.training.policy import token_logps
from insightv.training.torch_backend import TorchBackend
from insightv.training.trainer import train_sft


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return store(tmp_path_factory.mktemp("pictures"))


def config(**values) -> SFTConfig:
    plain = {"precision": "fp32", "device": "cpu", "learning_rate": 1e-3, "batch_size": 4}
    return SFTConfig(**{**plain, **values})


def examples(backend: TorchBackend, pictures) -> list:
    store_, ids = pictures
    return encode_all(sample_rows(ids), Encoder(backend.processor, store_, 4096, 64).sample)[0]


def packed(backend: TorchBackend, some: list, budget: int) -> list[Batch]:
    return Packer(backend.model, backend.packer.pad_token, budget).batches(some)


def gradients(backend: TorchBackend, batches) -> tuple[float, dict[str, torch.Tensor]]:
    backend.model.zero_grad()
    totals, loss = Totals.of(batches), 0.0
    for batch in batches:
        share, _ = Supervised().share(token_logps(backend.model, batch), batch, totals)
        share.backward()
        loss += share.item()
    named = backend.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_hugging_face(name, pictures):
    """One sample, against the model's own loss for `labels`."""
    backend = TorchBackend(family(name), config(freeze_vision=False))
    example = examples(backend, pictures)[5]
    batches = packed(backend, [example], 10**6)
    loss, got = gradients(backend, batches)
    inputs = chats.collate([example.replies[0].encoding], backend.packer.pad_token)
    labels = torch.full_like(inputs["input_ids"], -100)
    for start, stop in example.replies[0].spans:
        labels[0, start:stop] = inputs["input_ids"][0, start:stop]
    backend.model.zero_grad()
    theirs = backend.model(**inputs, labels=labels).loss
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), abs=1e-5)
    for parameter, gradient in got.items():
        want = dict(backend.model.named_parameters())[parameter].grad
        torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_normalised_over_the_global_batch(name, pictures):
    """Token NLLs of all samples, each alone in Hugging Face, over all target tokens."""
    backend = TorchBackend(family(name), config())
    some = examples(backend, pictures)
    loss, _ = gradients(backend, packed(backend, some, 600))
    total, tokens = 0.0, 0
    for example in some:
        reply = example.replies[0]
        inputs = chats.collate([reply.encoding], backend.packer.pad_token)
        with torch.no_grad():
            logps = backend.model(**inputs).logits[0].log_softmax(-1)
        for start, stop in reply.spans:
            for place in range(start, stop):
                total -= logps[place - 1, reply.encoding.ids[place]].item()
                tokens += 1
    assert loss == pytest.approx(total / tokens, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batches_change_nothing(name, pictures):
    backend = TorchBackend(family(name), config(freeze_vision=False))
    some = examples(backend, pictures)
    loss, whole = gradients(backend, packed(backend, some, 10**6))
    for budget in (1, 700):
        batches = packed(backend, some, budget)
        assert len(batches) > 1
        again, cut = gradients(backend, batches)
        assert again == pytest.approx(loss, abs=1e-5)
        for parameter, gradient in whole.items():
            torch.testing.assert_close(cut[parameter], gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl"])
def test_shared_pictures_change_the_cost_only(name, pictures, tmp_path):
    store_, ids = pictures
    rows = sample_rows(ids[:2], 12)
    told = []
    for share in (False, True):
        context = Here(tmp_path / f"{share}")
        settings = config(batch_size=12, epochs=4, share_pictures=share)
        counts = train_sft(settings, family(name), rows, store_, tmp_path / f"m{share}", context)
        assert counts["samples"] == 48
        told.append(context.lines())
    plain, shared = told
    assert [line["loss"] for line in shared] == pytest.approx(
        [line["loss"] for line in plain], abs=1e-5
    )
    for one, other in zip(plain, shared, strict=True):
        assert one["shared_tokens"] == 0
        assert other["tokens"] + other["shared_tokens"] == one["tokens"]
        assert other["tokens"] < one["tokens"] and other["flops"] < one["flops"]


def test_logits_in_pieces_and_recomputed_activations_change_nothing(pictures, monkeypatch):
    backend = TorchBackend(family("llava"), config())
    batches = packed(backend, examples(backend, pictures), 10**6)
    loss, whole = gradients(backend, batches)
    monkeypatch.setattr(policy, "LOGITS", 10 * 500)
    again, pieces = gradients(backend, batches)
    monkeypatch.setattr(policy, "_POSTPROCESSED", ("vocab_size",))
    third, full = gradients(backend, batches)
    recomputing = TorchBackend(family("llava"), config(recompute=True))
    fourth, thrifty = gradients(recomputing, batches)
    assert [again, third, fourth] == pytest.approx([loss] * 3, abs=1e-6)
    for parameter, gradient in whole.items():
        for other in (pieces, full, thrifty):
            torch.testing.assert_close(other[parameter], gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_learns_and_exports(name, pictures, tmp_path):
    store_, ids = pictures
    context, out = Here(tmp_path / "stage"), tmp_path / "models" / "agent"
    rows = sample_rows(ids)
    settings = config(epochs=12, learning_rate=5e-3, tokens_per_micro_batch=900)
    counts = train_sft(settings, family(name), rows, store_, out, context)
    lines = context.lines()
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert counts["step"] == 30 and counts["samples"] == 120 and counts["rows"] == 10
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert counts["last_loss"] == lines[-1]["loss"]
    assert lines[0]["lr"] == pytest.approx(5e-3 / 2) and lines[-1]["lr"] < 1e-4
    assert sum(line["tokens"] for line in lines) == counts["tokens"]
    assert {"grad_norm", "seconds", "target_tokens", "samples"} <= lines[0].keys()
    assert all(0.6 < line["packing_efficiency"] <= 1 for line in lines)
    assert all(line["shared_tokens"] == 0 for line in lines)
    assert context.seen[-1][:2] == (30, 30) and {"loss", "rate"} == context.seen[-1][2].keys()
    trained, base = models.load(out, "cpu"), models.load(family(name), "cpu")
    assert trained.digest == counts["model"] != base.digest
    frozen = {id(p) for p in models.vision_tower(base.model).parameters()}
    before = dict(base.model.named_parameters())
    models.freeze_vision(base.model)
    for parameter, value in trained.model.named_parameters():
        same = torch.equal(value, before[parameter])
        if not before[parameter].requires_grad:
            assert same and id(before[parameter]) in frozen
        elif "lm_head" in parameter or "proj" in parameter or "merger" in parameter:
            assert not same, parameter
    assert not (tmp_path / "stage" / "checkpoints").exists()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["agent"]


def test_bf16_trains_as_fp32_does(pictures, tmp_path):
    store_, ids = pictures
    last = {}
    for precision in ("fp32", "bf16"):
        context = Here(tmp_path / precision)
        settings = config(epochs=6, learning_rate=5e-3, precision=precision)
        out = tmp_path / f"model-{precision}"
        train_sft(settings, family("llava"), sample_rows(ids), store_, out, context)
        last[precision] = [line["loss"] for line in context.lines()]
        weights = load_file(out / "model.safetensors")
        assert all(value.dtype == torch.float32 for value in weights.values())
    assert last["bf16"] != last["fp32"]
    assert last["bf16"][-1] == pytest.approx(last["fp32"][-1], rel=0.2)


def test_attention_by_products_is_attention(pictures, monkeypatch):
    """Short batches in bf16 on a CPU take another road to the same loss, and only they."""
    backend = TorchBackend(family("llava"), config(precision="bf16"))
    batches = packed(backend, examples(backend, pictures), 10**6)
    assert backend.model.config._attn_implementation == "sdpa"
    short = backend.loss(batches[0], Supervised())
    assert backend.model.config._attn_implementation == "eager"
    monkeypatch.setattr(policy, "SHORT", 8)
    assert backend.loss(batches[0], Supervised()) == pytest.approx(short, rel=2e-3)
    assert backend.model.config._attn_implementation == "sdpa"


def test_what_is_dropped_is_told(pictures, tmp_path):
    store_, ids = pictures
    rows = sample_rows([*ids[:2], "f" * 64])
    context = Here(tmp_path)
    settings = config(max_length=70, epochs=2)
    counts = train_sft(settings, family("llava"), rows, store_, tmp_path / "m", context)
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").open()]
    broken = {row["key"] for row in rows if "f" * 64 in row["pictures"]}
    told = {line["key"] for line in dropped if "not in the store" in line["reason"]}
    assert told == broken and counts["dropped_broken"] == len(broken)
    long = {line["key"] for line in dropped if line["reason"].startswith("TooLong")}
    assert long and counts["dropped_too_long"] == len(long) and not long & broken
    assert counts["samples"] == 2 * (len(rows) - len(dropped))
    logged = {key for line in context.lines() for key in line.get("dropped", [])}
    assert logged == told | long


def test_nothing_left_is_an_error(pictures, tmp_path):
    store_, ids = pictures
    with pytest.raises(UserError, match="no step could be trained.*more than max_length 3"):
        train_sft(
            config(max_length=3),
            family("llava"),
            sample_rows(ids),
            store_,
            tmp_path / "m",
            Here(tmp_path),
        )
    assert not (tmp_path / "m").exists()


def poisoned(tmp_path, token: str):
    """A model that knows no number for one token."""
    loaded = models.load(family("llava"), "cpu")
    number = loaded.tokenizer.convert_tokens_to_ids(token)
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[number] = float("nan")
    models.save(loaded.model, loaded.processor, tmp_path / "poisoned")
    return tmp_path / "poisoned"


def test_a_loss_that_is_no_number_is_skipped_and_its_samples_told(pictures, tmp_path):
    store_, ids = pictures
    rows = sample_rows(ids)
    rows[3]["messages"][0]["text"] += " Z"
    model = poisoned(tmp_path, "Z")
    context = Here(tmp_path / "stage")
    settings = config(epochs=2, batch_size=3)
    counts = train_sft(settings, model, rows, store_, tmp_path / "m", context)
    skipped = [line for line in context.lines() if "skipped" in line]
    assert [line["skipped"] for line in skipped] == [[rows[3]["key"]]] * 2
    assert counts["skipped"] == 2 and all(line["loss"] is None for line in skipped)
    trained = models.load(tmp_path / "m", "cpu").model.get_output_embeddings().weight
    assert torch.isfinite(trained).all()
    few = config(epochs=2, batch_size=3, max_skipped_steps=1)
    with pytest.raises(UserError, match=f"not a number.*{rows[3]['key']}"):
        train_sft(few, model, rows, store_, tmp_path / "n", Here(tmp_path / "again"))


def spikes(lines: list[dict], factor: float, window: int) -> list[int]:
    """The steps whose norm is above ``factor`` times the median of the last applied ones."""
    norms, found = [], []
    for line in lines:
        if len(norms) >= window and line["grad_norm"] > factor * median(norms[-window:]):
            found.append(line["step"])
        else:
            norms.append(line["grad_norm"])
    return found


def test_a_spike_is_skipped_and_remembered(pictures, tmp_path):
    store_, ids = pictures
    rows = sample_rows(ids)
    keys = {"epochs": 2, "batch_size": 2, "spike_factor": 1.05, "spike_window": 3}
    settings = config(**keys, max_skipped_steps=9)
    whole = Here(tmp_path / "whole")
    counts = train_sft(settings, family("llava"), rows, store_, tmp_path / "m", whole)
    skipped = [line for line in whole.lines() if "skipped" in line]
    assert [line["step"] for line in skipped] == spikes(whole.lines(), 1.05, 3) != []
    assert counts["skipped"] == len(skipped) and "norms" not in counts
    for line in skipped:
        assert line["loss"] is None and line["mfu"] is None and len(line["skipped"]) == 2
    # The last norms are kept over a stop.
    for stop in (skipped[0]["step"] - 1, skipped[0]["step"]):
        parts = tmp_path / f"parts-{stop}"
        data = family("llava"), rows, store_, parts / "m"
        assert train_sft(settings, *data, Here(parts, stop_at=stop)) is None
        assert train_sft(settings, *data, Here(parts))["last_loss"] == counts["last_loss"]
        assert [line["loss"] for line in Here(parts).lines()] == [
            line["loss"] for line in whole.lines()
        ]
    few = config(**keys, max_skipped_steps=0)
    step = skipped[0]["step"]
    with pytest.raises(UserError, match=f"gradient norm of step {step} is .*, above .*samples set"):
        train_sft(few, family("llava"), rows, store_, tmp_path / "n", Here(tmp_path / "few"))
    with pytest.raises(UserError, match="spike_factor is 0.5"):
        config(spike_factor=0.5).validate()


def test_a_skipped_spike_changes_nothing(pictures):
    backend = TorchBackend(family("llava"), config())
    batches = packed(backend, examples(backend, pictures)[:3], 10**6)
    totals = Totals.of(batches)
    before = {name: weight.clone() for name, weight in backend.model.named_parameters()}
    norm = backend.step(batches, totals, Supervised(), 0.0).grad_norm
    moments = [v.clone() for s in backend._optimizer.state.values() for v in s.values()]
    spiked = backend.step(batches, totals, Supervised(), 1.0, bound=0.9 * norm)
    assert not spiked.applied and spiked.grad_norm == pytest.approx(norm)
    for name, weight in backend.model.named_parameters():
        assert torch.equal(weight, before[name])
    after = [v for s in backend._optimizer.state.values() for v in s.values()]
    assert all(map(torch.equal, after, moments))
    assert backend.step(batches, totals, Supervised(), 0.0, bound=1.1 * norm).applied


def test_a_finished_training_is_not_repeated(pictures, tmp_path):
    store_, ids = pictures
    rows, out = sample_rows(ids), tmp_path / "m"
    first = train_sft(config(), family("llava"), rows, store_, out, Here(tmp_path / "stage"))
    again = Here(tmp_path / "stage")
    assert train_sft(config(), family("llava"), rows, store_, out, again) == first
    assert again.seen == []
    # Another layout is the same training; other data are another one.
    layout = config(tokens_per_micro_batch=50, save_steps=1)
    assert train_sft(layout, family("llava"), rows, store_, out, again) == first
    other = train_sft(config(), family("llava"), rows[:-1], store_, out, again)
    assert again.seen and other["rows"] == 9 and len(again.lines()) == 5


def test_max_steps_ends_earlier(pictures, tmp_path):
    store_, ids = pictures
    context = Here(tmp_path)
    settings = config(epochs=5, max_steps=3)
    counts = train_sft(settings, family("llava"), sample_rows(ids), store_, tmp_path / "m", context)
    assert counts["step"] == 3 and context.seen[-1][:2] == (3, 3)


def test_a_wrong_model_folder_is_refused(pictures, tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        train_sft(config(), tmp_path / "none", [], pictures[0], tmp_path / "m", Here(tmp_path))
