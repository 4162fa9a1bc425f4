"""The torch backend: one process, one device, fp32 weights, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from hpc.errors import UserError
from insightv import models
from insightv.training.attention import SPANS, additive, attention_mask
from insightv.training.backend import Outcome
from insightv.training.config import TrainConfig
from insightv.training.objectives import Objective, Replies, Totals
from insightv.training.packing import Batch, Packer

LOGITS = 2**27
"""At most this many logits (targets × vocabulary) are held at once: 0.5 GB in fp32."""
SHORT = 512
"""Up to this width attention is one product over all rows, under a dense mask; beyond, the
mask's width² costs more than attending segment by segment."""
_POSTPROCESSED = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of families that change logits after the head, so that the head alone is wrong."""


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
        self.model.train()
        if config.freeze_vision:
            models.freeze_vision(self.model)
            models.vision_tower(self.model).eval()
        if config.recompute:
            # The newer name where there is one; the older goes with transformers 6.
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self._trained = {
            name: weight for name, weight in self.model.named_parameters() if weight.requires_grad
        }
        if not self._trained:
            raise UserError(f"{folder}: every tensor is frozen, nothing is left to train")
        pad_token, budget = loaded.tokenizer.pad_token_id, config.tokens_per_micro_batch
        self.packer = Packer(self.model, pad_token, budget)
        self._optimizer = torch.optim.AdamW(
            self._trained.values(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

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

    def save(self, folder: Path) -> None:
        """Weights that are trained, the optimizer's moments, random states; all safetensors."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self._trained.items()}
        for name, weight in self._trained.items():
            for kind, value in self._optimizer.state.get(weight, {}).items():
                tensors[f"{kind}.{name}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.startswith("cuda"):
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            folder / "training.safetensors",
        )

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
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.startswith("cuda") and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])

    def export(self, folder: Path) -> None:
        """See `Backend`."""
        models.save(self.model, self.processor, folder)


class LogProbs:
    """Log-probabilities of a batch's targets under one model, in one precision.

    The trainer and the reference stage both use it, so that a policy equal to its reference
    has margins of 0.
    """

    def __init__(self, model: Any, precision: str):
        """Takes a model on its device; ``precision`` is ``bf16`` (autocast) or ``fp32``."""
        self.model, self._half = model, precision == "bf16"
        self._device = torch.device(model.device).type
        self._attention: str = model.config._attn_implementation
        self._set = (self._attention, self._attention)

    def __call__(self, batch: Batch, most: int = 0) -> Tensor:
        """See `token_logps`; the batch is on the model's device."""
        # SDPA's backward pass on a CPU takes a third of a step; matrix products in bf16 make
        # the step 1.5 times as fast, at a cost in memory that grows with the square of width.
        short = batch.width <= SHORT
        outer = "eager" if self._device == "cpu" and self._half and short else self._attention
        wanted = (outer, outer if short else SPANS)
        if self._set != wanted:
            names = {"": outer, "vision_config": outer, "text_config": wanted[1]}
            self.model.set_attn_implementation(names)
            self._set = wanted
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._half):
            return token_logps(self.model, batch, most)


def token_logps(model: Any, batch: Batch, most: int = 0) -> Tensor:
    """Log-probabilities of a batch's targets.

    The vocabulary is reached at the target positions only, in pieces of bounded size that
    are computed again in the backward pass.

    Args:
        model: On the batch's device.
        batch: The micro-batch.
        most: As many pieces are made as so many targets need: ranks that hold the head
            together must ask for it equally often.

    Returns:
        [T] in fp32, nats.
    """
    text = model.config.get_text_config()
    inputs: dict[str, Any] = {**batch.inputs, "use_cache": False}
    if text._attn_implementation == SPANS:
        inputs["spans"] = attention_mask(batch, "spans")
    else:
        mask = attention_mask(batch, "dense")
        assert isinstance(mask, Tensor)
        if text._attn_implementation == "eager":
            # Eager attention adds its mask to the scores, in whatever type these are.
            half = torch.is_autocast_enabled(mask.device.type)
            mask = additive(mask, torch.bfloat16 if half else model.dtype)
        inputs["attention_mask"] = mask
    if any(getattr(text, name, None) for name in _POSTPROCESSED) or not hasattr(model, "lm_head"):
        logits = model(**inputs).logits.flatten(0, 1)
        return _logps(logits[batch.places], batch.targets)
    hidden = model.model(**inputs).last_hidden_state.flatten(0, 1)
    hidden = hidden[batch.places]
    pieces = max(1, math.ceil(max(most, len(hidden)) * text.vocab_size / LOGITS))
    if pieces == 1:
        return _logps(model.lm_head(hidden), batch.targets)
    return torch.cat(list(_in_pieces(model.lm_head, hidden, batch.targets, pieces)))


def _in_pieces(head: Any, hidden: Tensor, targets: Tensor, pieces: int) -> Iterator[Tensor]:
    def piece(some: Tensor, wanted: Tensor) -> Tensor:
        return _logps(head(some), wanted)

    cut = zip(hidden.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
    for some, wanted in cut:
        yield checkpoint(piece, some, wanted, use_reentrant=False)


def _logps(logits: Tensor, targets: Tensor) -> Tensor:
    return -cross_entropy(logits.float(), targets, reduction="none")
