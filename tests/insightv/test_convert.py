"""A model folder from a checkpoint: what the training itself would have exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_case import Here, family, sample_rows, store
from typer.testing import CliRunner

from hpc.errors import UserError
from insightv import models
from insightv.cli import app
from insightv.training.config import SFTConfig
from insightv.training.convert import convert
from insightv.training.trainer import train_sft

KEYS = {"precision": "fp32", "device": "cpu", "batch_size": 4, "learning_rate": 1e-3}
KEYS |= {"schedule": "constant", "warmup": 0.0}  # so that a step does not know how many follow


def trained(work: Path, base: Path, **keys) -> tuple[Path, Path]:
    """A checkpoint behind step 2 of 3, and the model of a training that ends there."""
    pictures, ids = store(work / "pictures")
    data = base, sample_rows(ids), pictures
    config = SFTConfig(**KEYS, **keys, max_steps=3)
    assert train_sft(config, *data, work / "none", Here(work / "cut", 2)) is None
    config.max_steps = 2
    assert train_sft(config, *data, work / "whole", Here(work / "ended"))
    return work / "cut" / "checkpoints" / "step-0000002", work / "whole"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    base = family("llava")
    return base, *trained(tmp_path_factory.mktemp("convert"), base)


def same(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_it_is_the_model_that_training_would_export(case, tmp_path):
    base, checkpoint, whole = case
    out = tmp_path / "out"
    words = ["convert", str(checkpoint), "--model", str(base), "--out", str(out)]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0 and "step 2" in told.output
    same(out, whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    models.load(out, "cpu", "float32")
    with pytest.raises(AssertionError):
        same(out, base)
    with pytest.raises(UserError, match="exists already"):
        convert(checkpoint, base, out)


@pytest.mark.parametrize("name", ["llava", "llava-next", "llava-onevision", "qwen2.5-vl"])
@pytest.mark.parametrize("backend", ["deepspeed", "megatron"])
def test_other_backends(tmp_path, backend, name):
    """One process each: what lies in a checkpoint knows no layout."""
    pytest.importorskip(backend)
    base = family(name)
    checkpoint, whole = trained(tmp_path, base, backend=backend, freeze_vision=name == "llava")
    convert(checkpoint, base, tmp_path / "out")
    same(tmp_path / "out", whole)


def test_what_does_not_fit_is_told(case, tmp_path):
    base, checkpoint, _ = case
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no checkpoint: give a folder"):
        convert(base, base, out)
    with pytest.raises(UserError, match="does not fit .*differs|does not fit .*it has no"):
        convert(checkpoint, family("qwen2.5-vl"), out)
    broken = shutil.copytree(checkpoint, tmp_path / "step-0000002")
    file = next(broken.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"is damaged .{file.name}."):
        convert(broken, base, out)
    state = json.loads((broken / "state.json").read_text())
    state["files"] = {"../elsewhere": "0"}
    (broken / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="is damaged"):
        convert(broken, base, out)
    assert not out.exists() and not list(tmp_path.glob("*.part"))
