"""The model with its throw-away heads and its losses, while it is being pretrained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, LlavaForConditionalGeneration

from insightv.demo import tiny
from insightv.demo.teaching import PREFIX, Batch, Teacher


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
    """The model with its two throw-away heads, and the switch between learning and writing."""

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

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All trained parameters, the heads' included."""
        yield from self.model.parameters()
        yield from self.tag_head.parameters()

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
            tag = F.cross_entropy(self.tag_head(hidden[tagged].float()), batch.tags[tagged])
            loss = loss + tag
            parts["tag"] = tag.item()
        return loss, parts

    def _dense(self, batch: Batch, teacher: Teacher) -> tuple[torch.Tensor, dict]:
        """How well each picture token resembles its mark's label and value."""
        seen = self._projected[0].float()
        seen = seen.reshape(-1, seen.shape[-1])
        words = self.model.model.language_model.embed_tokens.weight
        label = F.cross_entropy(seen @ words[teacher.label_ids].T, batch.patch_labels.reshape(-1))
        value = F.cross_entropy(seen @ words[teacher.number_ids].T, batch.patch_values.reshape(-1))
        return label + value, {"label": label.item(), "value": value.item()}
