"""What stands in megatron-core's local layers instead of its own: norm, rotary, attention."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from insightv.training.attention import span_attention, spans_of


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in fp32 as Llama and Qwen2 do."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        """Takes what megatron-core gives its norms."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    """FlexAttention is a kernel only when compiled; uncompiled it fills the whole matrix."""
    return torch.compile(flex_attention)


class Rotary(nn.Module):
    """Rotary embeddings of explicit positions, with transformers' frequencies and scaling."""

    def __init__(self, text: Any):
        """Takes a transformers configuration of a language model."""
        super().__init__()
        rotary = LlamaRotaryEmbedding(text)
        self.inverse = nn.Buffer(rotary.inv_freq, persistent=False)
        self.scaling = float(rotary.attention_scaling)
        self.sections: list[int] = text.rope_parameters.get("mrope_section") or []

    def forward(self, position_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Angles [W, R, 1, head] of positions [R, W] or, with M-RoPE, [3, R, W].

        The three rows of M-RoPE (time, height, width) each turn their section of the
        frequencies (arXiv 2409.12191).
        """
        angles = position_ids.unsqueeze(-1).float() * self.inverse
        if position_ids.ndim == 3:
            cuts = angles.split(self.sections, dim=-1)
            angles = torch.cat([cut[i % 3] for i, cut in enumerate(cuts)], dim=-1)
        return torch.cat([angles, angles], dim=-1).transpose(0, 1).unsqueeze(2).contiguous()


class CoreAttention(MegatronModule):
    """Softmax attention under any mask: SDPA, whole or by segments, or FlexAttention."""

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float, **__: Any):
        """Takes what megatron-core gives its attention."""
        super().__init__(config)
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *_: Any, **__: Any
    ) -> Tensor:
        """[W, R, heads, head] queries, [W, R, groups, head] keys and values → [W, R, heads · head].

        ``attention_mask`` is `Inputs.mask`.
        """
        q, k, v = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        gqa = q.shape[1] != k.shape[1]
        if isinstance(attention_mask, BlockMask):
            attend = _compiled_flex() if q.is_cuda else flex_attention
            out = attend(q, k, v, block_mask=attention_mask, scale=self.scale, enable_gqa=gqa)
        elif attention_mask is not None and attention_mask.dtype == torch.int32:
            spans = spans_of(attention_mask, len(q))
            seen = span_attention(self, q, k, v, None, spans, scaling=self.scale)[0]
            return seen.transpose(0, 1).flatten(2)
        else:
            out = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=attention_mask,
                is_causal=attention_mask is None,
                scale=self.scale,
                enable_gqa=gqa,
            )
        return out.permute(2, 0, 1, 3).flatten(2)  # type: ignore[union-attr]
