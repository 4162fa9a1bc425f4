"""The deepspeed backend on real ranks (gloo), against the torch backend on one process."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from deepspeed_ranks import (
    KINDS,
    config_of,
    examples_of,
    launch,
    objective_of,
    trained,
    whole_batch,
)
from families import save_family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_megatron_parity import save_model
from training_case import store

from hpc.errors import UserError
from insightv import models
from insightv.training.deepspeed import starting
from insightv.training.deepspeed.checkpoint import Saved, write
from insightv.training.torch_backend import TorchBackend

pytestmark = [
    pytest.mark.skipif(
        find_spec("deepspeed") is None,
        reason="deepspeed is not installed: pip install -e '.[deepspeed]'",
    ),
    pytest.mark.timeout(900),  # ranks that wait for each other are slow on a crowded machine
]
BASES = ("llava-next", "llava-onevision", "qwen2.5-vl", "qwen3-vl")
OPEN = {"freeze_vision": False}
CASES = {
    **{f"{base}-{stage}": (base, stage, {}) for base in BASES for stage in (1, 2, 3)},
    "tied": ("tied", 3, {}),
    "offload": ("llava-onevision", 2, {"offload": True}),
    "open": ("llava-next", 3, OPEN | {"recompute": True}),
}
ADAM = {"batch_size": 4, "epochs": 10, "learning_rate": 1e-3, "grad_clip": 1.0}
SHORT = ADAM | {"epochs": 3, "save_steps": 2}
HALF = SHORT | {"precision": "bf16"}
SPIKE = ADAM | {"batch_size": 2, "epochs": 3, "spike_factor": 1.05, "spike_window": 3}
SPIKE |= {"max_skipped_steps": 12}
RUNS = {
    "adam-1": ("sft", "llava-next", 1, ADAM, 0),
    "adam-2": ("dpo", "llava-onevision", 2, ADAM, 0),
    "adam-3": ("dpo", "qwen2.5-vl", 3, ADAM, 0),
    "short-2": ("dpo", "llava-onevision", 2, SHORT, 0),
    "short-3": ("dpo", "qwen2.5-vl", 3, SHORT, 0),
    "stopped-1": ("dpo", "qwen2.5-vl", 1, SHORT, 3),
    "stopped-3": ("dpo", "qwen2.5-vl", 3, SHORT, 3),
    "half-1": ("sft", "tied", 1, HALF, 0),
    "half-3": ("sft", "tied", 3, HALF | {"offload": True}, 0),
    "half-stopped-1": ("sft", "tied", 1, HALF, 3),
    "half-stopped-3": ("sft", "tied", 3, HALF | {"offload": True}, 3),
    "nan-1": ("dpo", "llava-onevision", 1, ADAM | {"epochs": 2, "bad": "nan"}, 0),
    "inf-2": (
        *("dpo", "llava-onevision", 2),
        HALF | {"epochs": 2, "bad": "-inf", "offload": True},
        0,
    ),
    "spike-2": ("dpo", "llava-onevision", 2, SPIKE, 0),
    "spike-3": ("dpo", "llava-onevision", 3, SPIKE | {"offload": True}, 0),
    "inf-3": ("dpo", "llava-onevision", 3, ADAM | {"epochs": 2, "bad": "-inf"}, 0),
}
"""Kind, base, stage, keys, steps until it is stopped."""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Bases, pictures, and what two ranks made of all the cases above."""
    work = tmp_path_factory.mktemp("work")
    for base in BASES:
        save_family(base, work / base)
    save_model("llava-onevision-tied", work / "tied")
    _, ids = store(work / "pictures")
    (work / "pictures.json").write_text(json.dumps(ids))
    assert not launch(
        2,
        work,
        *(["gradients", name, *case] for name, case in CASES.items()),
        *(["train", name, *run] for name, run in RUNS.items()),
    )
    return work


def reference(work: Path, base: str, **keys) -> dict[str, dict[str, torch.Tensor]]:
    """Loss, norm and gradients of the torch backend, for either kind."""
    backend, found = TorchBackend(work / base, config_of("sft", "torch", **keys)), {}
    for kind in KINDS:
        some = examples_of(work, kind, backend.processor)
        outcome = backend.step(*whole_batch(backend, some), objective_of(kind), 0.0)
        told = {"loss": outcome.loss, "norm": outcome.grad_norm}
        found[kind] = {key: torch.tensor(value) for key, value in told.items()}
        for weight_name, weight in backend.model.named_parameters():
            if weight.requires_grad:
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                found[kind][f"gradient.{weight_name}"] = gradient.clone()
    return found


@pytest.mark.parametrize("base", [*BASES, "tied"])
def test_gradients_of_a_step_are_those_of_torch(work, base):
    """Ranks have unequal tokens; some micro-batches have no picture, some are idle."""
    theirs = reference(work, base)
    for name, (model, _, keys) in CASES.items():
        if model == base and keys.get("freeze_vision", True):
            held(work, name, theirs)


def held(work: Path, case: str, theirs: dict[str, dict[str, torch.Tensor]]) -> None:
    """A case's numbers are these, of either kind."""
    for kind, want in theirs.items():
        ours = load_file(work / f"{case}-{kind}.safetensors")
        assert ours.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0)
        assert max(value.abs().max() for value in want.values()) > 0.1


def test_gradients_of_an_open_vision_tower_are_those_of_torch(work):
    """The tower's layers behind the features that are taken have none on any rank: zeros here."""
    held(work, "open", reference(work, "llava-next", **OPEN))


@pytest.mark.parametrize("name", ["adam-1", "adam-2", "adam-3"])
def test_20_steps_of_adam_follow_torch(work, name):
    kind, base, _, keys, _ = RUNS[name]
    trained(work / f"torch-{name}", kind, work / base, config_of(kind, "torch", **keys))
    ours, theirs = lines(work / name), lines(work / f"torch-{name}")
    assert len(ours) == len(theirs) == 20
    for here, there in zip(ours, theirs, strict=True):
        assert here.keys() == there.keys()
        for key in there.keys() - {"seconds", "packing_efficiency", "tokens"}:
            assert here[key] == pytest.approx(there[key], abs=1e-3), key
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 1
    alike(work / name / "model", work / f"torch-{name}" / "model", 1e-3)


def alike(folder: Path, other: Path, within: float) -> None:
    """The same files, and tensors of the same names that differ by less than ``within``."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=within, rtol=0)
    models.load(folder, "cpu", "float32")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def numbers(folder: Path) -> list[tuple]:
    return [(line["loss"], line["grad_norm"], line["lr"]) for line in lines(folder)]


def again(work: Path, stopped: str, name: str) -> None:
    """What was stopped, under another name, to go on from."""
    shutil.copytree(work / stopped, work / name)


@pytest.fixture(scope="module")
def resumed(work) -> Path:
    """Goes on from what was stopped or killed: at its own layout and at others."""
    assert launch(2, work, ["killed", "during", "during", *RUNS["short-2"]])
    left = sorted(path.name for path in (work / "during" / "checkpoints").iterdir())
    assert left == ["part-0000004", "step-0000002"]
    names = {
        **{f"same-{stage}": (f"stopped-{stage}", stage) for stage in (1, 3)},
        **{f"half-same-{stage}": (f"half-stopped-{stage}", stage) for stage in (1, 3)},
        "3-to-2": ("stopped-3", 2),
        "1-to-3": ("stopped-1", 3),
    }
    runs = [["train", "during", *RUNS["short-2"]]]
    for name, (stopped, stage) in names.items():
        again(work, stopped, name)
        kind, base, _, keys, _ = RUNS[stopped]
        runs.append(["train", name, kind, base, stage, keys, 0])
    assert not launch(2, work, *runs)
    return work


@pytest.mark.parametrize("stage", [1, 3])
def test_resumed_training_is_bitwise_the_same(resumed, stage):
    got = numbers(resumed / f"same-{stage}")
    assert len(got) == 6 and got[:3] == numbers(resumed / f"stopped-{stage}")
    if stage == 3:
        assert got == numbers(resumed / "short-3")
        alike(resumed / "same-3" / "model", resumed / "short-3" / "model", 0.0)
    close(got, numbers(resumed / "short-3"))


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_computes_in_bf16_from_fp32_weights(resumed, stage):
    whole, got = (numbers(resumed / f"{name}-{stage}") for name in ("half", "half-same"))
    assert got == whole
    alike(resumed / f"half-same-{stage}" / "model", resumed / f"half-{stage}" / "model", 0.0)
    model = load_file(resumed / f"half-{stage}" / "model" / "model.safetensors")
    kept = [
        weight for weight in model.values() if not torch.equal(weight, weight.bfloat16().float())
    ]
    assert kept  # what bf16 would have rounded away
    _, base, _, keys, _ = RUNS["half-1"]
    name = f"torch-half-{stage}"
    trained(resumed / name, "sft", resumed / base, config_of("sft", "torch", **keys))
    close(whole, numbers(resumed / name), 0.05)


@pytest.mark.parametrize("name", ["3-to-2", "1-to-3"])
def test_another_stage_goes_on(resumed, name):
    close(numbers(resumed / name), numbers(resumed / "short-3"))


def close(ours: list[tuple], theirs: list[tuple], within: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for here, there in zip(ours, theirs, strict=True):
        assert here == pytest.approx(there, abs=within)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_goes_on(work, ranks):
    name = f"{ranks}-ranks"
    again(work, "stopped-3", name)
    kind, base, stage, keys, _ = RUNS["stopped-3"]
    assert not launch(ranks, work, ["train", name, kind, base, stage, keys, 0])
    close(numbers(work / name), numbers(work / "short-3"))
    alike(work / name / "model", work / "short-3" / "model", 1e-4)


def test_killed_during_a_save_and_resumed_bitwise(resumed):
    assert numbers(resumed / "during") == numbers(resumed / "short-2")
    alike(resumed / "during" / "model", resumed / "short-2" / "model", 0.0)


@pytest.mark.full
@pytest.mark.parametrize(("when", "newest"), [("before", 2), ("after", 4)])
def test_killed_around_a_save_and_resumed_bitwise(work, when, newest):
    run = RUNS["short-2"]
    assert launch(2, work, ["killed", when, when, *run])
    found = sorted((work / when / "checkpoints").glob("step-*"))
    assert found[-1].name == f"step-{newest:07d}"
    assert not launch(2, work, ["train", when, *run])
    assert numbers(work / when) == numbers(work / "short-2")
    alike(work / when / "model", work / "short-2" / "model", 0.0)


@pytest.mark.parametrize("name", ["nan-1", "inf-2", "inf-3"])
def test_a_step_without_a_number_is_left_out_on_all_ranks(work, name):
    """An infinite loss whose gradient is finite, too; the steps behind it are good again."""
    found = lines(work / name)
    skipped = [line for line in found if "skipped" in line]
    assert len(found) == 4 and len(skipped) == 2
    assert all(line["loss"] is None and len(line["skipped"]) == 1 for line in skipped)
    assert {key for line in skipped for key in line["skipped"]} == {
        "set:train:4/r0/p0|set:train:4/r0/p1"
    }
    model = load_file(work / name / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in model.values())
    assert found[-1]["loss"] is None or found[-1]["loss"] < 100


@pytest.mark.parametrize("name", ["spike-2", "spike-3"])
def test_spikes_are_left_out_as_torch_does(work, name):
    kind, base, _, keys, _ = RUNS[name]
    trained(work / f"torch-{name}", kind, work / base, config_of(kind, "torch", **keys))
    ours, theirs = lines(work / name), lines(work / f"torch-{name}")
    assert len(ours) == 12 and any("skipped" in line for line in ours)
    for here, there in zip(ours, theirs, strict=True):
        assert here.get("skipped") == there.get("skipped")
        for key in ("loss", "grad_norm", "flops"):
            assert here[key] == pytest.approx(there[key], abs=1e-3), key
    alike(work / name / "model", work / f"torch-{name}" / "model", 1e-3)


@pytest.mark.full
def test_20_steps_of_sgd_follow_torch(work):
    rate, names = 0.01, [f"sgd-{stage}" for stage in (1, 2, 3)]
    runs = [["sgd", name, "qwen2.5-vl", int(name[-1]), rate] for name in names]
    assert not launch(2, work, *runs)
    backend = TorchBackend(work / "qwen2.5-vl", config_of("dpo", "torch"))
    backend._optimizer = torch.optim.SGD(backend._optimizer.param_groups[0]["params"], rate)
    batches, totals = whole_batch(backend, examples_of(work, "dpo", backend.processor))
    for _ in range(20):
        assert backend.step(batches, totals, objective_of("dpo"), rate).applied
    backend.export(work / "torch-sgd")
    for name in names:
        alike(work / name, work / "torch-sgd", 1e-4)


@pytest.mark.full
def test_three_ranks_and_an_open_vision_tower(work):
    cases = {
        f"three-{base}-{stage}": (
            base,
            stage,
            OPEN | {"recompute": stage == 3, "offload": stage != 2},
        )
        for base, stage in (("llava-next", 2), ("llava-onevision", 1), ("qwen2.5-vl", 3))
    }
    assert not launch(3, work, *(["gradients", name, *case] for name, case in cases.items()))
    for case, (base, *_) in cases.items():
        held(work, case, reference(work, base, **OPEN))


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 60),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
    seed=st.integers(),
)
def test_a_checkpoint_is_cut_anew(tmp_path_factory, size, writers, readers, seed):
    """Whatever ranges wrote a tensor, any other ranges read it."""
    chance = random.Random(seed)
    folder, whole = tmp_path_factory.mktemp("saved"), torch.randn(size)
    for rank, (start, stop) in enumerate(_ranges(chance, size, writers)):
        places = {"a": [start, stop - start, size]} if start < stop else {}
        tensors = {f"weight.{name}": whole[start:stop].clone() for name in places}
        tensors["random.cpu"] = torch.zeros(1)
        write(folder / f"zero-{rank:05d}.safetensors", writers, 3, places, tensors)
    saved = Saved(folder)
    assert (saved.ranks, saved.steps, saved.sizes) == (writers, 3, {"a": size})
    for start, stop in _ranges(chance, size, readers):
        into = torch.full((stop - start,), torch.nan)
        saved.read("weight", "a", start, into)
        assert torch.equal(into, whole[start:stop])
    if writers > 1:
        (folder / "zero-00000.safetensors").unlink()
        with pytest.raises(UserError, match="lacks files"):
            Saved(folder)


def _ranges(chance: random.Random, size: int, count: int) -> list[tuple[int, int]]:
    cuts = sorted(chance.randint(0, size) for _ in range(count - 1))
    return list(zip([0, *cuts], [*cuts, size], strict=True))


def test_a_damaged_part_is_told(tmp_path):
    (tmp_path / "zero-00000.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="zero-00000.safetensors is damaged"):
        Saved(tmp_path)


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"needs deepspeed: pip install -e '.\[deepspeed\]'"):
        starting.imported()


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "mine")
    with pytest.raises(KeyError), models.deepspeed_told(gpu=False, LOCAL_RANK="0"):
        assert (os.environ["LOCAL_RANK"], os.environ["DS_ACCELERATOR"]) == ("0", "mine")
        raise KeyError
    assert "LOCAL_RANK" not in os.environ
    assert os.environ["DS_ACCELERATOR"] == "mine"


def test_a_stage_that_there_is_not():
    with pytest.raises(UserError, match="deepspeed.zero_stage is 4: choose one of 1, 2, 3"):
        config_of("sft", stage=4).validate()
