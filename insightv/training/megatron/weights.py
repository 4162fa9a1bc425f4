"""Weights between a Hugging Face folder and the ranks of any layout, bit for bit.

A parameter of a rank is pieces of Hugging Face tensors behind each other (`spans`). Reading
copies the pieces out of the folder, writing copies them back; both use the same list, so one
undoes the other. Tensors pass one at a time: a rank reads its own pieces only, and the first
tensor parallel rank of each stage gathers and writes what its stage holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed

from insightv.training.folder import Writer, finish
from insightv.training.megatron.families import (
    LANGUAGE,
    LAYER,
    Cut,
    Row,
    language_name,
    shape_of,
    sizes_of,
    vision_name,
)
from insightv.training.megatron.folders import Folder, Naming, Span
from insightv.training.megatron.layout import Layout, Shape
from insightv.training.megatron.model import VisionLanguageModel


def spans(row: Row, shape: Shape, layout: Layout, rank: int) -> list[Span]:
    """What a parameter of one tensor parallel rank is made of, in order.

    Args:
        row: The parameter.
        shape: The language model's sizes.
        layout: How many tensor parallel ranks there are.
        rank: The tensor parallel rank.
    """
    sizes = sizes_of(shape)
    if row.cut is Cut.WHOLE:
        return [Span(name, 0, 0, sizes[name][0]) for name in row.tensors]
    if row.cut is Cut.HEADS:
        return _head_spans(row, shape, layout.tensor_parallel, rank)
    dimension = 1 if row.cut is Cut.COLUMNS else 0
    pieces = []
    for name in row.tensors:
        size = sizes[name][dimension]
        # Only a vocabulary is padded; what is behind its end belongs to no tensor.
        whole = layout.padded_vocabulary(size) if row.cut is Cut.ROWS else size
        length = whole // layout.tensor_parallel
        start = min(rank * length, size)
        pieces.append(Span(name, dimension, start, min(start + length, size)))
    return pieces


def _head_spans(row: Row, shape: Shape, ranks: int, rank: int) -> list[Span]:
    """Group by group: the group's queries, its keys, its values."""
    query, key, value = row.tensors
    wide = shape.heads // shape.groups * shape.head
    each = shape.groups // ranks
    pieces = []
    for group in range(rank * each, (rank + 1) * each):
        pieces.append(Span(query, 0, group * wide, (group + 1) * wide))
        for name in (key, value):
            pieces.append(Span(name, 0, group * shape.head, (group + 1) * shape.head))
    return pieces


def parameters(piece: VisionLanguageModel) -> Iterator[tuple[Row, str, Tensor]]:
    """The language model's parameters of a stage.

    Yields:
        The row of the table, what stands before its tensors' names, and the parameter.

    Raises:
        ValueError: The model has a parameter that no row names.
    """
    held = dict(piece.language.named_parameters())
    for row in LANGUAGE:
        if row.name in held:
            if row.name == "output_layer.weight" and piece.share_embeddings_and_output_weights:
                yield replace(row, tensors=LANGUAGE[0].tensors), "", held.pop(row.name)
            else:
                yield row, "", held.pop(row.name)
    for local, layer in enumerate(piece.language.decoder.layers):
        for row in LAYER:
            name = f"decoder.layers.{local}.{row.name}"
            if name in held:
                yield row, f"layers.{layer.layer_number - 1}.", held.pop(name)
    if held:
        raise ValueError(f"parameters that no row of the table names: {sorted(held)}")


@torch.no_grad()
def load(pieces: Sequence[VisionLanguageModel], config: Any, layout: Layout, source: Path) -> None:
    """Fills this rank's part of a model from a Hugging Face folder.

    Every rank checks the whole folder, so that all of them refuse it or none does.

    Raises:
        UserError: The folder is damaged, or a tensor missing, extra or of the wrong shape.
    """
    folder = Folder(source)
    naming = Naming.of(config, folder.shapes)
    naming.check(folder)
    shape, rank = shape_of(config), parallel_state.get_tensor_model_parallel_rank()
    for piece in pieces:
        for row, before, parameter in parameters(piece):
            parameter.zero_()  # rows behind the vocabulary stay so
            for span, part in parts(row, shape, layout, rank, parameter):
                name = language_name(naming.dialect, before + span.tensor)
                part.copy_(folder.read(name, span))
        if piece.vision is not None:
            for name, tensor in piece.vision.state_dict().items():
                tensor.copy_(folder.whole(vision_name(naming.dialect, name)))


def parts(
    row: Row, shape: Shape, layout: Layout, rank: int, parameter: Tensor
) -> Iterator[tuple[Span, Tensor]]:
    """Each span of a parameter of a rank, and a view of the part that holds the span."""
    dimension, start = int(row.cut is Cut.COLUMNS), 0
    for span in spans(row, shape, layout, rank):
        length = span.stop - span.start
        yield span, parameter.narrow(dimension, start, length)
        start += length


@torch.no_grad()
def export(
    pieces: Sequence[VisionLanguageModel], config: Any, layout: Layout, source: Path, target: Path
) -> None:
    """Writes a model as a Hugging Face folder; every rank must call it.

    It is whole when all ranks are back. Names, configuration and processor are those of
    ``source``, the folder it was loaded from. The first data parallel copy writes: each stage
    its own files, tensor after tensor.

    Args:
        pieces: This rank's part of the model.
        config: A transformers configuration of the whole model.
        layout: How it is laid over the ranks.
        source: A folder of the same model.
        target: An empty folder on a file system that all ranks see.
    """
    target.mkdir(parents=True, exist_ok=True)
    naming = Naming.of(config, Folder(source).shapes)
    writer = Writer(target, parallel_state.get_pipeline_model_parallel_rank())
    if parallel_state.get_data_parallel_rank() == 0:
        for name, tensor in stage_tensors(pieces, shape_of(config), layout):
            writer.add(naming.place(name), tensor)
        writer.close()
    distributed.barrier()
    writer.check()
    if distributed.get_rank() == 0:
        dtype = next(pieces[0].parameters()).dtype
        finish(source, target, str(dtype).removeprefix("torch."))


def stage_tensors(
    pieces: Sequence[VisionLanguageModel],
    shape: Shape,
    layout: Layout,
    of: Callable[[Tensor], Tensor | None] = lambda parameter: parameter,
) -> Iterator[tuple[str, Tensor]]:
    """A stage's whole tensors, gathered one at a time.

    All tensor parallel ranks of the stage must go through it together.

    Args:
        pieces: This rank's part of the model.
        shape: The language model's sizes.
        layout: How it is laid over the ranks.
        of: What is gathered of each parameter: itself, something of its shape (its gradient),
            or None, the same on all ranks, to leave it out.

    Yields:
        On the first tensor parallel rank: names (``language.…`` as in the table, ``vision.…``)
        and tensors on the CPU. On the others nothing.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    sizes = sizes_of(shape)
    for piece in pieces:
        for row, before, parameter in parameters(piece):
            twin = row.name == "output_layer.weight" and piece.share_embeddings_and_output_weights
            if twin:
                continue  # the first stage holds the same
            wanted = of(parameter)
            shards = _gathered(wanted) if wanted is not None else []
            if not shards:
                continue
            whole = {name: torch.empty(sizes[name], dtype=shards[0].dtype) for name in row.tensors}
            for number, shard in enumerate(shards):
                for span, part in parts(row, shape, layout, number, shard):
                    span.of(whole[span.tensor]).copy_(part)
            for name, tensor in whole.items():
                yield f"language.{before}{name}", tensor
        if piece.vision is not None and rank == 0:
            for name, tensor in piece.vision.state_dict(keep_vars=True).items():
                wanted = of(tensor)
                if wanted is not None:
                    yield f"vision.{name}", wanted.detach().cpu().clone()


def _gathered(tensor: Tensor) -> list[Tensor]:
    """Shards of all tensor parallel ranks, on the CPU of the first; an empty list elsewhere."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return [tensor.detach().cpu()]
    shard = tensor.detach().contiguous()
    shards = [torch.empty_like(shard) for _ in range(group.size())] if not group.rank() else None
    distributed.gather(shard, shards, dst=distributed.get_global_rank(group, 0), group=group)
    return [shard.cpu() for shard in shards or []]
