"""Trainings with the megatron backend on four ranks, against the torch backend on one."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import megatron_ranks
import pytest
import torch
from families import save_family
from megatron_ranks import Run
from safetensors.torch import load_file
from training_case import Here, pair_rows, sample_rows, store

from hpc.errors import UserError
from insightv import models
from insightv.pictures import Pictures
from insightv.training.config import DPOConfig, ReferenceConfig, SFTConfig
from insightv.training.reference import Reference
from insightv.training.trainer import train_dpo, train_sft

pytest.importorskip(
    "megatron.core", reason="megatron-core is not installed: pip install -e '.[megatron]'"
)
from insightv.training.megatron.layout import Layout  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # four processes on two cores that others use, too
FAMILY = "qwen2.5-vl"
PLAIN = {"precision": "fp32", "device": "cpu", "learning_rate": 1e-3, "batch_size": 6}
GRADIENT = PLAIN | {
    "beta1": 0.0,  # the first moment is the gradient
    "grad_clip": 0.0,
    "freeze_vision": False,
    "tokens_per_micro_batch": 200,
    "epochs": 2,
}
"""So that a checkpoint behind step 1 holds the gradient of step 0."""
WIDE = GRADIENT | {"tokens_per_micro_batch": 1000, "recompute": True}
"""One row of all samples, wide enough for attention segment by segment."""
LAYOUTS = ("tp2", "pp2", "tp2-pp2", "pp2-virtual", "tp2-sp", "pp2-uneven")
ADAM = PLAIN | {
    "epochs": 8,
    "weight_decay": 0.1,
    "tokens_per_micro_batch": 300,
    "save_steps": 3,
}
SPIKE = ADAM | {"batch_size": 3, "spike_factor": 1.05, "spike_window": 3, "epochs": 4}
SPIKE |= {"max_skipped_steps": 99}
SGD = PLAIN | {"epochs": 12, "max_length": 100, "learning_rate": 0.1, "warmup": 0.0}
RUNS = [
    *(Run(f"dpo-{layout}", layout, GRADIENT, pairs=True, stop_at=1) for layout in LAYOUTS),
    *(Run(f"sft-{layout}", layout, GRADIENT, stop_at=1) for layout in ("tp2-pp2", "pp2-virtual")),
    Run("dpo-tp2-pp2-sp", "tp2-pp2-sp", WIDE, pairs=True, stop_at=1),
    Run("adam", "tp2-pp2", ADAM, pairs=True),
    Run("stopped", "tp2-pp2", ADAM, pairs=True, stop_at=5),
    Run("spike", "tp2", SPIKE, pairs=True),
]
AGAIN = [
    Run("same", "tp2-pp2", ADAM, pairs=True),
    Run("other", "tp1", ADAM | {"recompute": True, "save_steps": 4}, pairs=True),
]
"""After the runs: what goes on from the one that was stopped."""
FEWER = Run("fewer", "tp1", ADAM, pairs=True)
"""The same on two ranks: TP2 × PP2 goes on as TP1 × DP2."""
MANY = [
    *(
        Run(f"{kind}-many-{layout}", layout, GRADIENT, pairs=kind == "dpo", stop_at=1)
        for kind, layout in (("dpo", "tp2-pp2"), ("sft", "tp2-pp4-sp"))
    ),
    Run("many-sgd", "tp2-pp2", SGD | {"epochs": 3}, descent=True),
]
"""On 16 ranks: TP2 × PP2 × DP4 and TP2 × PP4 × DP2, with the distributed optimizer."""
LONG = [
    Run("adam-20", "tp2-pp2", ADAM | {"epochs": 20}, pairs=True),
    Run("sgd", "pp2-virtual", SGD, descent=True),
    *(
        Run(f"sft-{layout}", layout, GRADIENT, stop_at=1)
        for layout in LAYOUTS
        if f"sft-{layout}" not in {run.name for run in RUNS}
    ),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The base, rows with their reference values, pictures."""
    work = tmp_path_factory.mktemp("work")
    save_family(FAMILY, work / "base", layers=4)
    pictures, ids = store(work / "pictures")
    reference = Reference(work / "base", ReferenceConfig(precision="fp32"), pictures)

    async def refer():
        made = [await reference(str(n), {"pairs": [row]}) for n, row in enumerate(pair_rows(ids))]
        await reference.close()
        return [row for rows in made for row in rows]

    rows = {"samples": sample_rows(ids), "pairs": asyncio.run(refer())}
    data = rows | {"reference": reference.digest}
    (work / "data.json").write_text(json.dumps(data))
    return work


@pytest.fixture(scope="module")
def made(work):
    """All of them, on processes that live once a list, and the same on one process of torch."""
    megatron_ranks.spawn(megatron_ranks.trainings, work, work / "base", RUNS)
    for run in (*AGAIN, FEWER):
        shutil.copytree(work / "stopped", work / run.name)
    megatron_ranks.spawn(megatron_ranks.trainings, work, work / "base", AGAIN)
    megatron_ranks.spawn(megatron_ranks.trainings, work, work / "base", [FEWER], world=2)
    one(work, "sft", GRADIENT, stop_at=1)
    one(work, "dpo", GRADIENT, stop_at=1)
    one(work, "dpo", ADAM, name="torch-adam")
    one(work, "dpo", SPIKE, name="torch-spike")
    return work


@pytest.fixture(scope="module")
def long(made):
    work = made
    megatron_ranks.spawn(megatron_ranks.trainings, work, work / "base", LONG)
    one(work, "dpo", ADAM | {"epochs": 20}, name="torch-adam-20")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", megatron_ranks.descend)
        one(work, "sft", SGD, name="torch-sgd")
    return work


def one(work: Path, kind: str, keys: dict, stop_at: int = 0, name: str = "") -> None:
    data, place = json.loads((work / "data.json").read_text()), work / (name or f"torch-{kind}")
    common = (Pictures([work / "pictures"]), place / "model", Here(place / "stage", stop_at))
    if kind == "sft":
        train_sft(SFTConfig(**keys), work / "base", data["samples"], *common)
    else:
        train_dpo(DPOConfig(**keys), work / "base", data["pairs"], *common, data["reference"])


def lines(work: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (work / name / "stage" / "metrics.jsonl").open()]


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    """First moments of the newest checkpoint, by the names of the megatron backend."""
    newest = max((folder / "stage" / "checkpoints").iterdir())
    found = {}
    for file in newest.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not name.startswith("exp_avg."):
                continue
            short = name.removeprefix("exp_avg.").removeprefix("model.")
            if not short.startswith(("language.", "vision.")):
                language = short.startswith(("language_model.", "lm_head."))
                short = ("language." if language else "vision.") + short.removeprefix(
                    "language_model."
                )
            found[short] = tensor
    return found


@pytest.mark.parametrize(
    ("kind", "layout"),
    [tuple(run.name.split("-", 1)) for run in RUNS if run.name[:4] in ("sft-", "dpo-")],
)
def test_gradients_of_the_first_step_are_those_of_torch(made, kind, layout):
    same_gradients(made, kind, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_sft_on_every_layout(long, layout):
    same_gradients(long, "sft", layout)


def same_gradients(made: Path, kind: str, layout: str) -> None:
    theirs, ours = gradients(made / f"torch-{kind}"), gradients(made / f"{kind}-{layout}")
    assert ours.keys() == theirs.keys()
    assert any(value.abs().max() > 1e-3 for name, value in theirs.items() if "vision." in name)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=0, msg=name)
    (here,), (there,) = lines(made, f"{kind}-{layout}"), lines(made, f"torch-{kind}")
    unlike = {"seconds", "packing_efficiency"}
    assert here.keys() == there.keys()
    for name in there.keys() - unlike:
        assert here[name] == pytest.approx(there[name], abs=1e-5), name


@pytest.mark.full
def test_sgd_follows_torch(long):
    sgd_follows(long, "sgd", 20)
    files = [long / name / "stage" / "dropped.jsonl" for name in ("sgd", "torch-sgd")]
    assert files[0].read_text() == files[1].read_text()
    theirs = lines(long, "torch-sgd")
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.5


def sgd_follows(made: Path, name: str, steps: int) -> None:
    ours, theirs = lines(made, name), lines(made, f"torch-{name}")
    assert len(ours) == len(theirs) == steps
    for here, there in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm"):
            assert here[key] == pytest.approx(there[key], abs=1e-4), key
        assert here.get("dropped") == there.get("dropped")
    assert any("dropped" in line for line in ours)
    weights(made, f"torch-{name}", name, 1e-4)


@pytest.fixture(scope="module")
def many(made):
    megatron_ranks.spawn(megatron_ranks.trainings, made, made / "base", MANY, world=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", megatron_ranks.descend)
        one(made, "sft", SGD | {"epochs": 3}, name="torch-many-sgd")
    return made


@pytest.mark.full
@pytest.mark.parametrize(("kind", "layout"), [("dpo", "tp2-pp2"), ("sft", "tp2-pp4-sp")])
def test_gradients_on_16_ranks(many, kind, layout):
    same_gradients(many, kind, f"many-{layout}")


@pytest.mark.full
def test_sgd_on_16_ranks(many):
    sgd_follows(many, "many-sgd", 5)


@pytest.mark.full
def test_adam_follows_torch_for_20_steps(long):
    adam_follows(long, "adam-20", 20)


def test_adam_follows_torch(made):
    adam_follows(made, "adam", 8)


def adam_follows(made: Path, name: str, steps: int) -> None:
    ours, theirs = lines(made, name), lines(made, f"torch-{name}")
    assert len(ours) == len(theirs) == steps
    for here, there in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "margin", "logp_chosen", "kl"):
            assert here[key] == pytest.approx(there[key], abs=1e-3), key
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.1
    weights(made, f"torch-{name}", name, 1e-3)


def weights(work: Path, name: str, other: str, within: float) -> None:
    """Both models load, and their weights are alike."""
    first, second = (
        dict(models.load(work / each / "model", "cpu", "float32").model.named_parameters())
        for each in (name, other)
    )
    assert first.keys() == second.keys()
    for weight, value in first.items():
        torch.testing.assert_close(second[weight], value, atol=within, rtol=0, msg=weight)


def told(work: Path, name: str) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(work, name)]


def test_stopped_and_resumed_is_bitwise_the_same(made):
    assert len(lines(made, "stopped")) == 5
    assert told(made, "same") == told(made, "adam")
    weights(made, "adam", "same", 0.0)
    assert not list((made / "same").rglob("checkpoints"))


@pytest.mark.parametrize("name", ["other", "fewer"])
def test_another_layout_goes_on(made, name):
    """From TP2 × PP2 on TP1 × DP4 and on TP1 × DP2."""
    for here, there in zip(lines(made, name), lines(made, "adam"), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], abs=1e-4)
    weights(made, "adam", name, 1e-4)


def test_a_step_has_the_same_samples_on_any_ranks(made):
    keys = ("step", "samples", "tokens", "target_tokens", "shared_tokens", "lr")
    ours = [[line[key] for key in keys] for line in lines(made, "other")]
    assert ours == [[line[key] for key in keys] for line in lines(made, "torch-adam")]


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("before", marks=pytest.mark.full),
        "during",
        pytest.param("after", marks=pytest.mark.full),
    ],
)
def test_killed_around_a_save_it_goes_on_bitwise(made, when):
    name = f"killed-{when}"
    killed = Run(name, "tp2-pp2", ADAM, pairs=True, kill=when)
    megatron_ranks.spawn(megatron_ranks.trainings, made, made / "base", [killed], dies=True)
    assert (made / name / "stage" / "checkpoints").is_dir()
    assert not (made / name / "model").exists()
    going = Run(name, "tp2-pp2", ADAM, pairs=True)
    megatron_ranks.spawn(megatron_ranks.trainings, made, made / "base", [going])
    assert told(made, name) == told(made, "adam")
    weights(made, "adam", name, 0.0)


def test_a_bad_row_ends_all_with_one_line(made):
    megatron_ranks.spawn(megatron_ranks.refused, made, made / "base")
    said = [(made / f"refused-{rank}").read_text() for rank in range(megatron_ranks.WORLD)]
    assert sum(line == "SystemExit 2" for line in said) == 3
    (line,) = (line for line in said if line.startswith("UserError"))
    assert "training sample set:train:7: the chat must begin with a user turn" in line


def test_spikes_are_skipped_as_torch_does(made):
    ours, theirs = lines(made, "spike"), lines(made, "torch-spike")
    assert any("skipped" in line for line in ours)
    for here, there in zip(ours, theirs, strict=True):
        assert here.get("skipped") == there.get("skipped")
        for name in ("loss", "grad_norm", "flops"):
            assert here[name] == pytest.approx(there[name], abs=1e-3), name
    weights(made, "torch-spike", "spike", 1e-3)


def test_a_loss_that_is_no_number_is_skipped_by_all(made):
    """On no rank; the sample is found by the copy that has it."""
    work = made / "poisoned"
    base = models.load(made / "base", "cpu", "float32")
    with torch.no_grad():
        token = base.tokenizer.convert_tokens_to_ids("Z")
        base.model.get_input_embeddings().weight[token] = float("nan")
    models.save(base.model, base.processor, work / "base")
    (work / "pictures").symlink_to(made / "pictures")
    data = json.loads((made / "data.json").read_text())
    data["samples"][3]["messages"][0]["text"] += " Z"
    (work / "data.json").write_text(json.dumps(data))
    config = PLAIN | {"batch_size": 10, "epochs": 2}
    runs = [Run("run", "tp2", config), Run("few", "pp2-virtual", config | {"max_skipped_steps": 1})]
    with pytest.raises(AssertionError, match="UserError.*the loss of step 2 is not a number.*:3:"):
        megatron_ranks.spawn(megatron_ranks.trainings, work, work / "base", runs[1:])
    assert [line["skipped"] for line in lines(work, "few")] == [["set:train:3"]]
    with pytest.raises(AssertionError, match="no step could be trained"):
        megatron_ranks.spawn(megatron_ranks.trainings, work, work / "base", runs[:1])
    assert [line["skipped"] for line in lines(work, "run")] == [["set:train:3"]] * 2


def test_one_process_is_told_how_to_start_many(work, tmp_path):
    config = SFTConfig(**PLAIN, backend="megatron", megatron=Layout(2, 2))
    rows = json.loads((work / "data.json").read_text())["samples"]
    with pytest.raises(UserError, match="is 4, and this is one process.*nproc-per-node 4"):
        train_sft(
            config,
            work / "base",
            rows,
            Pictures([work / "pictures"]),
            tmp_path / "m",
            Here(tmp_path),
        )
