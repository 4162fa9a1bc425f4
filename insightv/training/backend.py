"""What a trainer asks of the machinery that holds the model, and which one to load.

Every rank makes the same calls in the same order. Ranks that hold parts of one copy of the
model get the same micro-batches; another copy gets others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc.errors import UserError
from insightv.training.checkpoint import Write
from insightv.training.config import TrainConfig
from insightv.training.objectives import Objective, Replies, Totals
from insightv.training.packing import Batch, Packer
from insightv.training.ranks import Ranks


@dataclass(frozen=True)
class Outcome:
    """What one optimizer step came to; the same on every rank.

    Attributes:
        loss: Of the global batch.
        grad_norm: Global gradient norm before clipping.
        applied: False if the loss or a gradient was not a number, or the norm above what was
            allowed: no weight and no state of the optimizer was changed.
        metrics: The objective's own numbers; empty if not applied.
    """

    loss: float
    grad_norm: float
    applied: bool
    metrics: dict[str, float | bool]


class Backend(Protocol):
    """One model on all ranks of a training.

    Attributes:
        processor: Of the model.
        packer: Makes micro-batches of the shapes this backend wants.
        digest: Of the model folder training began from.
        copies: Data parallel copies of the model.
        copy: The one this rank holds, or holds a part of.
    """

    processor: Any
    packer: Packer
    digest: str
    copies: int
    copy: int

    def step(
        self,
        batches: Sequence[Batch],
        totals: Totals,
        objective: Objective,
        rate: float,
        bound: float = math.inf,
    ) -> Outcome:
        """Takes one optimizer step.

        Args:
            batches: This copy's micro-batches, as many as every other copy has.
            totals: Of the global batch.
            objective: What is minimised.
            rate: Learning rate.
            bound: Largest gradient norm with which the step is taken.
        """
        ...

    def loss(self, batch: Batch, objective: Objective) -> float:
        """The loss of a micro-batch by itself; no weight changes.

        Copies may ask for different ones; they all ask equally often.
        """
        ...

    def snapshot(self) -> Write:
        """Copies everything a later `resume` needs into the node's memory.

        Returns:
            Writes it into an existing folder; asks nothing of other ranks, so that a thread may
            do it while training goes on.
        """
        ...

    def resume(self, folder: Path) -> None:
        """Goes back to exactly the state that was written."""
        ...

    def export(self, folder: Path) -> None:
        """Writes the model in Hugging Face format into an existing folder."""
        ...


def load_backend(folder: Path, config: TrainConfig, ranks: Ranks) -> Backend:
    """Loads the model into the backend a training asks for.

    Raises:
        UserError: The folder is no model, the backend does not take it or the number of ranks,
            or what it needs is not installed.
    """
    if config.backend == "torch":
        from insightv.training.torch_backend import TorchBackend

        return TorchBackend(folder, config)
    if config.backend == "megatron":
        if find_spec("megatron") is None:
            raise UserError("backend=megatron needs megatron-core: pip install -e '.[megatron]'")
        with warnings.catch_warnings():
            # It misses Transformer Engine and apex in nine places; neither is needed.
            warnings.simplefilter("ignore")
            from insightv.training.megatron.backend import MegatronBackend

        return MegatronBackend(folder, config, ranks)
    if config.backend == "deepspeed":
        from insightv.training.deepspeed.backend import DeepSpeedBackend

        return DeepSpeedBackend(folder, config, ranks)
    raise UserError(f"no backend {config.backend!r}")


def whole_batch(
    ranks: Ranks, speaks: bool, losses: Sequence[Tensor], parts: Sequence[Replies]
) -> tuple[float, list[Replies]]:
    """Joins what the copies know of a step; the same on every rank, in the same order.

    Args:
        ranks: All of them call this.
        speaks: Whether this rank speaks for its copy; one a copy does.
        losses: The copy's shares of the loss.
        parts: The copy's replies.

    Returns:
        The loss of the global batch, and all its replies.
    """
    if ranks.count == 1:
        return torch.stack(list(losses)).sum().item(), list(parts)
    loss = torch.stack(list(losses)).sum().item() if speaks else 0.0
    numbers = [{k: v.tolist() for k, v in vars(part).items()} for part in parts if speaks]
    told = ranks.every(lambda: (loss, numbers))
    replies = [
        Replies(**{name: torch.tensor(values) for name, values in part.items()})
        for _, of_copy in told
        for part in of_copy
    ]
    return sum(loss for loss, _ in told), replies
