"""TensorBoard's event files say what metrics.jsonl says."""

import sys
from importlib.util import find_spec

import pytest
from training_case import Here, family, sample_rows, store

from hpc.errors import UserError
from insightv.training.config import SFTConfig
from insightv.training.trainer import train_sft

KEYS = {"precision": "fp32", "device": "cpu", "batch_size": 2, "peak_tflops": 1.0}
needed = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="pip install -e '.[tensorboard]'"
)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Every tag's steps and values, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder))
    shown.Reload()
    return {
        tag: [(event.step, event.value) for event in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
    }


@needed
def test_events_are_the_metrics_also_after_a_resume(tmp_path):
    pictures, ids = store(tmp_path / "pictures")
    data = family("llava"), sample_rows(ids), pictures, tmp_path / "model"
    config = SFTConfig(**KEYS, epochs=1, tensorboard=True)
    stage = tmp_path / "stage"
    assert train_sft(config, *data, Here(stage, stop_at=2)) is None
    saved = stage / "saved"
    (stage / "checkpoints").rename(saved)
    assert train_sft(config, *data, Here(stage, stop_at=4)) is None
    for newer in (stage / "checkpoints").iterdir():
        assert newer.name != "step-0000002"
    # Two steps behind the only checkpoint: they are taken again, and shown once.
    newer.rename(tmp_path / "lost")
    (stage / "checkpoints").rmdir()
    saved.rename(stage / "checkpoints")
    assert train_sft(config, *data, Here(stage))
    lines, shown = Here(stage).lines(), scalars(stage / "tensorboard")
    assert len(lines) == 5 and len(list((stage / "tensorboard").iterdir())) == 3
    assert shown.keys() == lines[0].keys() - {"step"} >= {"loss", "mfu", "flops", "grad_norm"}
    for tag, found in shown.items():
        want = [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in lines]
        assert found == want, tag


def test_without_the_key_nothing_is_written(tmp_path):
    pictures, ids = store(tmp_path / "pictures")
    data = family("llava"), sample_rows(ids), pictures, tmp_path / "model"
    assert train_sft(SFTConfig(**KEYS, max_steps=1), *data, Here(tmp_path / "stage"))
    assert not (tmp_path / "stage" / "tensorboard").exists()


def test_a_missing_package_is_told_before_anything_is_done(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = SFTConfig(**KEYS, tensorboard=True)
    nothing = tmp_path / "no model"
    with pytest.raises(UserError, match=r"needs tensorboard: pip install -e '\.\[tensorboard\]'$"):
        train_sft(config, nothing, [], None, tmp_path / "out", Here(tmp_path / "stage"))
