"""Micro-batches through the stages: forward and backward of one step, gradients summed.

A loss is an exact share of the global batch's (`insightv.training.objectives`): shares and
their gradients are summed over micro-batches and data parallel copies and never averaged.
megatron-core divides by the number of micro-batches, or by tokens it counts itself, unless it
is kept from it; both are switched off here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from insightv.training.megatron import cpu
from insightv.training.megatron.model import Inputs, VisionLanguageModel

Loss = Callable[[Tensor, int], tuple[Tensor, Any]]
"""From this rank's columns of the logits and the micro-batch's number to its share of the loss
and whatever else the caller wants back."""


def replicate(
    pieces: Sequence[VisionLanguageModel], distributed_optimizer: bool = False
) -> list[DistributedDataParallel]:
    """Data parallel copies of a model: fp32 gradients in ``main_grad``, summed once a step.

    Args:
        pieces: This rank's part of the model; what requires no gradient gets no buffer.
        distributed_optimizer: Whether optimizer states will be cut over the copies (ZeRO-1).
    """
    config = pieces[0].config
    config.finalize_model_grads_func = _reduce
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        average_in_collective=False,
    )
    with cpu.calls():
        return [
            DistributedDataParallel(config, settings, piece, disable_bucketing=number > 0)
            for number, piece in enumerate(pieces)
        ]


def _reduce(model: Any, num_tokens: Tensor | None = None, **options: Any) -> None:
    """Sums gradients over copies, tied embeddings and tensor parallel ranks; scales nothing."""
    finalize_model_grads(model, None, **options)


def forward_backward(
    pieces: Sequence[Any], batches: Sequence[Inputs], loss: Loss, backward: bool = True
) -> list[Any]:
    """Runs all micro-batches of this copy through the pipeline (1F1B, or interleaved).

    Every rank of a copy calls it with the same micro-batches. Gradients are zeroed first.

    Args:
        pieces: From `build`, or from `replicate` if there is a backward pass.
        batches: Micro-batches of one shape [R, W]. With virtual stages their number is a
            multiple of the pipeline parallel size.
        loss: Called on the last stage, the same way on all its tensor parallel ranks.
        backward: Whether gradients are wanted.

    Returns:
        On the last stage what ``loss`` gave back, in order; elsewhere an empty list.
    """
    rows, width = batches[0].input_ids.shape
    if any(batch.input_ids.shape != (rows, width) for batch in batches):
        raise ValueError("micro-batches of one step must have one shape")
    if backward:
        for piece in pieces:
            piece.zero_grad_buffer()

    def forward(numbered: Iterator[tuple[int, Inputs]], piece: Any) -> tuple[Tensor, Any]:
        number, inputs = next(numbered)

        def share(logits: Tensor) -> tuple[Tensor, Tensor, Any]:
            value, found = loss(logits, number)
            # Counted as no tokens, so that nothing is divided by them.
            return value, torch.zeros((), dtype=torch.int, device=value.device), found

        return piece(inputs), share

    with cpu.calls(), torch.set_grad_enabled(backward):
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(enumerate(batches)) for _ in pieces],
            model=list(pieces),
            num_microbatches=len(batches),
            seq_length=width,
            micro_batch_size=rows,
            forward_only=not backward,
        )
    return results
