"""The policy as transformers builds it: made ready for training, and its log-probabilities.

What the backends share that train such a model whole or cut, and what the reference stage
computes with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from hpc.errors import UserError
from insightv import models
from insightv.training.attention import SPANS, additive, attention_mask
from insightv.training.config import TrainConfig
from insightv.training.packing import Batch

LOGITS = 2**27
"""At most this many logits (targets × vocabulary) are held at once: 0.5 GB in fp32."""
SHORT = 512
"""Up to this width attention is one product over all rows, under a dense mask; beyond, the
mask's width² costs more than attending segment by segment."""
_POSTPROCESSED = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of families that change logits after the head, so that the head alone is wrong."""


def prepare(model: Any, config: TrainConfig, folder: Path) -> dict[str, nn.Parameter]:
    """Freezes what is not trained, and sets up recomputation.

    Args:
        model: As loaded; changed in place.
        config: Of the training.
        folder: The model's, for messages.

    Returns:
        The trained weights by their names.

    Raises:
        UserError: Nothing is left to train.
    """
    model.train()
    if config.freeze_vision:
        models.freeze_vision(model)
        models.vision_tower(model).eval()
    if config.recompute:
        # The newer name where there is one; the older goes with transformers 6.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained:
        raise UserError(f"{folder}: every tensor is frozen, nothing is left to train")
    return trained


def adamw(weights: Iterable[Any], config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer of a training."""
    return torch.optim.AdamW(
        weights,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def random_states(device: str) -> dict[str, Tensor]:
    """The states of the generators that dropout draws from, by name."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor], device: str) -> None:
    """Goes back to `random_states`; a state of another kind of device is left out."""
    torch.set_rng_state(states["random.cpu"])
    if device.startswith("cuda") and "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"])


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
