"""Model FLOP utilisation: how much of the devices' peak a training's own arithmetic is.

    MFU = operations of the global step / (seconds × sum of the ranks' peaks)

Operations are the model's own (`insightv.training.balance.Cost`; arXiv 2204.02311, appendix B):
what is computed again in the backward pass, padding, blank pictures and idle micro-batches are
work without use, and not counted.
"""

from __future__ import annotations

import re

import torch

from insightv.training.config import TrainConfig
from insightv.training.ranks import Ranks

_PEAKS = {
    r"NVIDIA B200": (2250.0, 75.0),
    r"NVIDIA GH200 .*": (989.5, 67.0),
    r"NVIDIA H200": (989.5, 67.0),
    r"NVIDIA H200 NVL": (835.5, 60.0),
    r"NVIDIA H100 80GB HBM3": (989.5, 67.0),  # SXM
    r"NVIDIA H100 NVL": (835.5, 60.0),
    r"NVIDIA H100 PCIe": (756.5, 51.0),
    r"(NVIDIA )?A100[- ](SXM|PCI|80GB PCI).*": (312.0, 19.5),
    r"NVIDIA L40S": (362.0, 91.6),
    r"NVIDIA L4": (121.0, 30.3),
    r"NVIDIA RTX A6000": (154.8, 38.7),
    r"NVIDIA GeForce RTX 4090": (165.2, 82.6),
}
"""By the name CUDA gives a device: published peaks in bf16 with fp32 sums, on tensor cores and
dense (half of what is printed "with sparsity"), and in fp32 without TF32; 10¹² a second. From
NVIDIA's data sheets of each product, and for GeForce RTX 4090 and RTX A6000 from the white
papers of their architectures (AD102, GA102). Full boost clocks, which a device under load holds
only in part."""


def device_peak(name: str, precision: str) -> float | None:
    """Operations a second that a device reaches at best; None if it is not known.

    Args:
        name: As CUDA tells it. A slice of a device (MIG) is not the device.
        precision: ``bf16`` or ``fp32``.
    """
    for known, (half, single) in _PEAKS.items():
        if re.fullmatch(known, name) and " MIG " not in name:
            return 1e12 * (half if precision == "bf16" else single)
    return None


def peak(config: TrainConfig, ranks: Ranks) -> float | None:
    """Operations a second of all ranks together; None if one's is not known.

    Args:
        config: ``peak_tflops`` goes before the table.
        ranks: All of them call this, each with its device set.
    """

    def own() -> float | None:
        if config.peak_tflops:
            return config.peak_tflops * 1e12
        if config.device == "cpu" or not torch.cuda.is_available():
            return None
        return device_peak(torch.cuda.get_device_name(), config.precision)

    known = [found for found in ranks.every(own) if found is not None]
    return sum(known) if len(known) == ranks.count else None


def utilisation(flops: float, seconds: float, peak: float | None) -> float | None:
    """The share of ``peak`` that ``flops`` in ``seconds`` are, to four digits."""
    if not peak or seconds <= 0:
        return None
    return float(f"{flops / (seconds * peak):.4g}")
