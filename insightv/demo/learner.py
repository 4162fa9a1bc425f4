"""The model with its throw-away heads and its losses, while it is being pretrained.

A scorer must find a stated label in the picture, compare the values, and tell in its reply: with
four layers there is none to spare. So finding is taught at the output of the second layer and
comparing at that of the third, where the reply's tokens can still see it in the fourth.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, LlavaForConditionalGeneration

from insightv.demo import tiny
from insightv.demo.teaching import PREFIX, Batch, Teacher

FOUND, COMPARED = 1, 2
"""Layers, counted from 0, behind which the scorer's two steps are taught."""


def _plain_attention(module, query, key, value, attention_mask=None, scaling=1.0, **_):  # type: ignore[no-untyped-def]
    """Attention as three matrix products in bfloat16: on CPU, SDPA's backward is slower."""
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        scores = (query * scaling) @ key.transpose(2, 3)
        if attention_mask is not None:
            scores = scores + attention_mask
        out = torch.softmax(scores, -1) @ value
    return out.transpose(1, 2).contiguous(), None


class Learner:
    """The model with its throw-away heads, and the switch between learning and writing."""

    def __init__(self, tokenizer: Any, seed: int, compiled: bool, start: Path | None):
        """Begins with the model of a folder, or (``start`` None) with a fresh one."""
        torch.manual_seed(seed)
        self.model: Any = (
            tiny.build_model(tokenizer)
            if start is None
            else LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        )
        hidden: Any = self.model.get_input_embeddings().embedding_dim
        self.tag_head = torch.nn.Linear(hidden, 2)
        self.value_head = torch.nn.Linear(hidden, len(tokenizer))
        self._early: dict[int, torch.Tensor] = {}
        for depth in (FOUND, COMPARED):
            layer = self.model.model.language_model.layers[depth]
            layer.register_forward_hook(partial(self._keep, depth))
        self._projected: list[torch.Tensor] = []
        self.model.model.multi_modal_projector.register_forward_hook(
            lambda module, inputs, output: self._projected.append(output)
        )
        AttentionInterface.register("plain", _plain_attention)
        tower = self.model.model.vision_tower
        encoder = getattr(tower, "encoder", None) or tower.vision_model.encoder
        self._layers = [*self.model.model.language_model.layers, *encoder.layers]
        self._eager = [layer.forward for layer in self._layers]
        torch._dynamo.config.recompile_limit = 64
        self._fast = [
            torch.compile(forward, dynamic=False) if compiled else forward
            for forward in self._eager
        ]
        self.learning()

    def _keep(self, depth: int, module: Any, inputs: Any, output: Any) -> None:
        self._early[depth] = output[0] if isinstance(output, tuple) else output

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All trained parameters, the heads' included."""
        yield from self.model.parameters()
        yield from self.tag_head.parameters()
        yield from self.value_head.parameters()

    def learning(self) -> None:
        """Compiled layers and plain attention."""
        self._switch("plain", self._fast)
        self.model.train()

    def writing(self) -> None:
        """The model as its users will run it."""
        self._switch("sdpa", self._eager)
        self.model.eval()

    def _switch(self, attention: str, forwards: list) -> None:
        self.model.model.language_model.config._attn_implementation = attention
        self.model.model.vision_tower.config._attn_implementation = attention
        for layer, forward in zip(self._layers, forwards, strict=True):
            layer.forward = forward

    def loss(self, batch: Batch, teacher: Teacher, dense: float) -> tuple[torch.Tensor, dict]:
        """Cross-entropy of the replies, plus the dense losses; and the parts as numbers."""
        self._projected.clear()
        if batch.pixels is not None and batch.ids.shape[1] == PREFIX:
            with torch.autocast("cpu", torch.bfloat16):
                self.model.model.get_image_features(pixel_values=batch.pixels)
            return self._dense(batch, teacher)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(
                input_ids=batch.ids,
                pixel_values=batch.pixels,
                position_ids=batch.positions,
                attention_mask=batch.mask,
                use_cache=False,
            ).last_hidden_state
            wanted = batch.labels[:, 1:] != -100
            logits = self.model.lm_head(hidden[:, :-1][wanted])
        loss = F.cross_entropy(logits.float(), batch.labels[:, 1:][wanted])
        parts = {"reply": loss.item()}
        if dense > 0 and (batch.patch_labels != -100).any():
            seeing, numbers = self._dense(batch, teacher)
            loss = loss + dense * seeing
            parts |= numbers
        tagged = batch.tags != -100
        if tagged.any():
            checks, numbers = self._checks(batch, tagged)
            loss = loss + checks
            parts |= numbers
        return loss, parts

    def _checks(self, batch: Batch, tagged: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """At labels of stated values: the true value; at the values: whether they are true."""
        compared = self.tag_head(self._early[COMPARED][tagged].float())
        tag = F.cross_entropy(compared, batch.tags[tagged])
        found = self.value_head(self._early[FOUND][:, :-1][tagged[:, 1:]].float())
        value = F.cross_entropy(found, batch.labels[tagged])
        return tag + value, {"tag": tag.item(), "found": value.item()}

    def _dense(self, batch: Batch, teacher: Teacher) -> tuple[torch.Tensor, dict]:
        """How well each picture token resembles its mark's label and value."""
        seen = self._projected[0].float()
        seen = seen.reshape(-1, seen.shape[-1])
        words = self.model.model.language_model.embed_tokens.weight
        label = F.cross_entropy(seen @ words[teacher.label_ids].T, batch.patch_labels.reshape(-1))
        value = F.cross_entropy(seen @ words[teacher.number_ids].T, batch.patch_values.reshape(-1))
        return label + value, {"label": label.item(), "value": value.item()}
