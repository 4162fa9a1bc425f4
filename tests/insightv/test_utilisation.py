"""What a training's arithmetic is of its devices' peak."""

import json

import pytest
from training_case import Here, family, sample_rows, store

from insightv.training.config import SFTConfig
from insightv.training.ranks import Ranks
from insightv.training.trainer import train_sft
from insightv.training.utilisation import device_peak, peak, utilisation


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H200", 989.5e12, 67e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    ],
)
def test_peaks_by_name(name, half, single):
    assert device_peak(name, "bf16") == half
    assert device_peak(name, "fp32") == single


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100",
        "Tesla V100-SXM2-32GB",
        "",
    ],
)
def test_another_device_is_not_guessed(name):
    assert device_peak(name, "bf16") is None


class Told(Ranks):
    """Ranks of which the others have said something already."""

    def __init__(self, *others):
        super().__init__()
        self.count, self._others = 1 + len(others), list(others)

    def every(self, work):
        return [work(), *self._others]


def test_ranks_add_up_unless_one_is_unknown():
    config = SFTConfig(device="cpu", peak_tflops=2.0)
    assert peak(config, Told(2e12, 3e12)) == 7e12
    assert peak(config, Told(2e12, None)) is None
    assert peak(SFTConfig(device="cpu"), Told(2e12)) is None
    assert utilisation(3e12, 2.0, 6e12) == 0.25
    assert utilisation(3e12, 2.0, None) is None


def test_a_training_tells_both(tmp_path):
    pictures, ids = store(tmp_path / "pictures")
    lines, contexts = {}, {}
    for name, keys in {
        "plain": {},
        "packed": {"tokens_per_micro_batch": 150},
        "peak": {"peak_tflops": 0.5},
    }.items():
        config = SFTConfig(batch_size=4, epochs=1, precision="fp32", device="cpu", **keys)
        here = contexts[name] = Here(tmp_path / name)
        rows = sample_rows(ids, 6)
        train_sft(config, family("llava"), rows, pictures, tmp_path / f"{name}-model", here)
        lines[name] = here.lines()
    assert [line["flops"] for line in lines["plain"]] == [line["flops"] for line in lines["packed"]]
    assert all(line["flops"] > 1e6 and line["mfu"] is None for line in lines["plain"])
    for line, (_, _, numbers) in zip(lines["peak"], contexts["peak"].seen, strict=True):
        # ``seconds`` are rounded to 0.1 ms.
        assert line["mfu"] == pytest.approx(line["flops"] / line["seconds"] / 5e11, rel=0.02)
        assert numbers["mfu"] == line["mfu"]
    assert not any("mfu" in numbers for _, _, numbers in contexts["plain"].seen)
    # How fast the machine is belongs to no result: the same training, found done.
    config = SFTConfig(batch_size=4, epochs=1, precision="fp32", device="cpu", peak_tflops=9.0)
    again = train_sft(
        config, family("llava"), rows, pictures, tmp_path / "plain-model", contexts["plain"]
    )
    assert again == json.loads((tmp_path / "plain" / "training.json").read_text())["counts"]
