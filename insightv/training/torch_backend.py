"""The torch backend: one process, one device, fp32 weights, AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpc.errors import UserError
from insightv import models
from insightv.training.backend import Outcome
from insightv.training.checkpoint import Write, copied
from insightv.training.config import TrainConfig
from insightv.training.objectives import Objective, Replies, Totals
from insightv.training.packing import Batch, Packer
from insightv.training.policy import (
    LogProbs,
    adamw,
    prepare,
    random_states,
    set_random_states,
)


class TorchBackend:
    """One model on one device; see `insightv.training.backend.Backend`."""

    copies, copy = 1, 0

    def __init__(self, folder: Path, config: TrainConfig):
        """Loads the model and makes its optimizer.

        Raises:
            UserError: The folder is no model, or nothing in it is left to train.
        """
        loaded = models.load(folder, device=config.device, dtype="float32")
        self.model, self.processor, self.digest = loaded.model, loaded.processor, loaded.digest
        self.device = str(self.model.device)
        self._logps = LogProbs(self.model, config.precision)
        self._clip = config.grad_clip or math.inf
        torch.manual_seed(config.seed)  # dropout, where a model has any
        self._trained = prepare(self.model, config, folder)
        pad_token, budget = loaded.tokenizer.pad_token_id, config.tokens_per_micro_batch
        self.packer = Packer(self.model, pad_token, budget)
        self._optimizer = adamw(self._trained.values(), config)

    def step(
        self,
        batches: Sequence[Batch],
        totals: Totals,
        objective: Objective,
        rate: float,
        bound: float = math.inf,
    ) -> Outcome:
        """See `Backend`."""
        self._optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        parts: list[Replies] = []
        for batch in batches:
            batch = batch.to(self.device)
            logps = self._logps(batch)
            share, part = objective.share(logps, batch, totals)
            share.backward()
            losses.append(share.detach())
            if part is not None:
                parts.append(part)
        loss = torch.stack(losses).sum().item()
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), self._clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm) and norm <= bound):
            self._optimizer.zero_grad(set_to_none=True)
            return Outcome(loss, norm, False, {})
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return Outcome(loss, norm, True, objective.metrics(parts))

    @torch.no_grad()
    def loss(self, batch: Batch, objective: Objective) -> float:
        """See `Backend`."""
        batch = batch.to(self.device)
        return objective.share(self._logps(batch), batch, Totals.of([batch]))[0].item()

    def snapshot(self) -> Write:
        """Weights that are trained, the optimizer's moments, random states; all safetensors."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self._trained.items()}
        for name, weight in self._trained.items():
            for kind, value in self._optimizer.state.get(weight, {}).items():
                tensors[f"{kind}.{name}"] = value
        tensors |= random_states(self.device)
        copies = copied(tensors)
        return lambda folder: save_file(copies, folder / "training.safetensors")

    @torch.no_grad()
    def resume(self, folder: Path) -> None:
        """See `Backend`.

        Raises:
            UserError: The checkpoint is of another model.
        """
        tensors = load_file(folder / "training.safetensors")
        saved = {name[7:] for name in tensors if name.startswith("weight.")}
        if saved != self._trained.keys():
            odd = sorted(saved ^ self._trained.keys())[0]
            raise UserError(f"checkpoint {folder} is of another model ({odd} differs); remove it")
        for name, weight in self._trained.items():
            weight.copy_(tensors.pop(f"weight.{name}"))
            # AdamW's `step` counter stays a CPU or device scalar wherever `fused` put it.
            self._optimizer.state[weight] = {
                kind: value.to(weight.device)
                for kind in ("step", "exp_avg", "exp_avg_sq")
                if (value := tensors.pop(f"{kind}.{name}", None)) is not None
            }
        set_random_states(tensors, self.device)

    def export(self, folder: Path) -> None:
        """See `Backend`."""
        models.save(self.model, self.processor, folder)
