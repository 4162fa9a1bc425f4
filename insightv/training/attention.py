"""Who sees whom in a packed micro-batch, as each kind of attention takes it.

========= =========================================================================
dense     a mask for SDPA: right for narrow rows, costs width² a row
spans     SDPA segment by segment, causal or behind its prefix: costs what is seen,
          on a CPU and on a GPU; the `torch` backend's choice for wide rows
flex      a block mask for FlexAttention, whose compiled kernels run on a GPU only
varlen    cumulative lengths for flash kernels; where nothing branches
========= =========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from insightv.training.packing import Batch, Span

SPANS = "insightv_spans"
"""The name under which transformers knows `span_attention`."""


@dataclass(frozen=True)
class Varlen:
    """Rows without branches as one ragged sequence, as flash kernels take it.

    Attributes:
        bounds: [S + 1] int32, where each of the S segments starts and the last one ends, in
            the flattened rows (``cu_seqlens``); padding is a segment of its own.
        longest: Tokens of the longest segment.
    """

    bounds: Tensor
    longest: int


Mask = Tensor | BlockMask | Varlen | tuple[tuple[Span, ...], ...]


def attention_mask(batch: Batch, kind: str) -> Mask:
    """Turns a micro-batch's segments into what an attention takes.

    Args:
        batch: The micro-batch, on the device the mask is for.
        kind: ``dense``, ``spans``, ``flex`` or ``varlen``, see above.

    Raises:
        ValueError: ``varlen`` is asked for and there are branches.
    """
    return _KINDS[kind](batch)


def _dense(batch: Batch) -> Tensor:
    """[R, 1, W, W] bool, true where a query (dimension 2) sees a key."""
    segments, prefixes = batch.segments, batch.prefixes
    keys = segments[:, None, :]
    seen = (keys == segments[:, :, None]) | (keys == prefixes[:, :, None])
    return seen.tril_().unsqueeze(1)


def _flex(batch: Batch) -> BlockMask:
    segments, prefixes = batch.segments, batch.prefixes

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        owner = segments[b, key]
        alike = (owner == segments[b, query]) | (owner == prefixes[b, query])
        return (key <= query) & alike

    rows, width = segments.shape
    return create_block_mask(seen, rows, None, width, width, device=str(segments.device))


def _varlen(batch: Batch) -> Varlen:
    if any(span.prefix_stop for row in batch.spans for span in row):
        raise ValueError("a batch with branches has no ragged form: use dense, spans or flex")
    starts = []
    for number, row in enumerate(batch.spans):
        starts += [number * batch.width + span.start for span in row]
        if row[-1].stop < batch.width:
            starts.append(number * batch.width + row[-1].stop)
    bounds = torch.tensor([*starts, batch.segments.numel()], dtype=torch.int32)
    return Varlen(bounds.to(batch.segments.device), int(bounds.diff().max()))


_KINDS: dict[str, Callable[[Batch], Mask]] = {
    "dense": _dense,
    "spans": lambda batch: batch.spans,
    "flex": _flex,
    "varlen": _varlen,
}


def span_table(batch: Batch) -> Tensor:
    """``spans`` as a tensor [S, 5] on the CPU: the number of its row before each of them."""
    table = [(number, *span) for number, row in enumerate(batch.spans) for span in row]
    return torch.tensor(table, dtype=torch.int32)


def spans_of(table: Tensor, rows: int) -> list[list[Span]]:
    """The spans of each row, back from `span_table`."""
    spans: list[list[Span]] = [[] for _ in range(rows)]
    for number, *span in table.tolist():
        spans[number].append(Span(*span))
    return spans


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense mask as what eager attention adds to its scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def span_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    spans: Sequence[Sequence[Span]],
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed rows, one segment after the other, as transformers calls it.

    A prefix is plain causal attention, for which SDPA has its fast kernels; a branch attends
    to its prefix's keys and its own. Nothing is computed for pairs that are not seen.

    Args:
        module: The layer (unused).
        query: [R, heads, W, size].
        key: [R, key heads, W, size], as ``value``.
        value: See ``key``.
        attention_mask: None; ``spans`` stands for it.
        spans: The micro-batch's, row by row.
        dropout: Of the attention's weights.
        scaling: Of the scores; None is 1/√size.

    Returns:
        [R, W, heads, size], zeros at padding.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # each key head serves that many query heads
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    rows = []
    for number, row in enumerate(spans):
        queries, keys, values = (each[number : number + 1] for each in (query, key, value))
        seen = [_span(queries, keys, values, span, dropout, scaling) for span in row]
        if (empty := query.shape[2] - row[-1].stop) > 0:
            shape = (1, query.shape[1], empty, value.shape[3])
            seen.append(seen[0].new_zeros(shape))
        rows.append(torch.cat(seen, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _span(
    query: Tensor, key: Tensor, value: Tensor, span: Span, dropout: float, scaling: float | None
) -> Tensor:
    own = slice(span.start, span.stop)
    query = query[:, :, own]
    if not span.prefix_stop:
        return scaled_dot_product_attention(
            query, key[:, :, own], value[:, :, own], None, dropout, is_causal=True, scale=scaling
        )
    prefix = slice(span.prefix_start, span.prefix_stop)
    key, value = (torch.cat([each[:, :, prefix], each[:, :, own]], dim=2) for each in (key, value))
    shape = (query.shape[2], key.shape[2])
    mask = torch.ones(shape, dtype=torch.bool, device=query.device)
    mask = mask.tril_(diagonal=span.prefix_stop - span.prefix_start)
    return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)


AttentionInterface.register(SPANS, span_attention)
