"""How much memory a rank needs: counted for weights, estimated for activations.

Nothing here is measured. Weights, gradients and optimizer states are counted exactly (the
counts are held against models built on meta tensors in the tests). Activations follow the
accounting of arXiv 2205.05198, adapted to grouped queries, gated feed-forward layers and
attention kernels that keep no score matrix; allocator waste and buffers of the communication
library are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from insightv.training.megatron.layout import Layout, Shape


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a stage.

    Attributes:
        weights: As they compute: bf16, mostly.
        gradients: fp32, of what is trained.
        optimizer: fp32 weights and Adam's two moments, cut over data parallel copies.
        activations: Kept for the backward pass at the schedule's worst moment.
        buffers: What is gathered or exchanged at once.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Load:
    """What a rank works on at once.

    Attributes:
        tokens: Of a micro-batch.
        targets: Of a micro-batch; logits are computed for these only.
        micro_batches: Of a step, on one data parallel copy.
        recompute: Whether layers are computed again in the backward pass.
    """

    tokens: int
    targets: int
    micro_batches: int
    recompute: bool = True


def layer_weights(shape: Shape, tensor_parallel: int) -> int:
    """Numbers in one decoder layer on one tensor parallel rank."""
    projections = (shape.heads + 2 * shape.groups) * shape.head
    cut = projections * shape.hidden + shape.heads * shape.head * shape.hidden
    cut += 3 * shape.feed_forward * shape.hidden + projections * shape.bias
    return cut // tensor_parallel + 2 * shape.hidden + 2 * shape.head * shape.qk_norm


def language_weights(shape: Shape, layout: Layout, stage: int) -> int:
    """Numbers of the language model on one rank of a pipeline stage."""
    held = len(layout.stage_layers(shape.layers, stage))
    count = held * layer_weights(shape, layout.tensor_parallel)
    table = layout.padded_vocabulary(shape.vocabulary) // layout.tensor_parallel * shape.hidden
    first, last = stage == 0, stage == layout.pipeline_parallel - 1
    if first:
        count += table
    if last:
        count += shape.hidden
        count += 0 if first and shape.tied else table
    return count


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage keeps, in units of all its layers.

    1F1B keeps one for each stage that is still to come, itself included. The interleaved
    schedule keeps some more chunks (arXiv 2104.04473, section 2.2).
    """
    stages, virtual = layout.pipeline_parallel, layout.virtual_stages
    if virtual == 1:
        return min(stages - stage, micro_batches)
    chunks = 2 * (stages - stage - 1) + (virtual - 1) * stages + 1
    return min(chunks, micro_batches * virtual) / virtual


def activations(shape: Shape, layout: Layout, stage: int, load: Load) -> int:
    """Estimated bytes of bf16 activations on one rank."""
    ranks = layout.tensor_parallel
    split = ranks if layout.sequence_parallel else 1
    # A norm keeps its input in fp32 and its output; so do two of them, plus two residuals.
    stream = 20 * shape.hidden / split
    heads = (shape.heads + 2 * shape.groups) * shape.head
    cut = (6 * heads + 2 * shape.heads * shape.head + 8 * shape.feed_forward) / ranks
    layer = load.tokens * (stream + cut)
    kept = load.tokens * 2 * shape.hidden / split if load.recompute else layer
    layers = len(layout.stage_layers(shape.layers, stage))
    count = kept * layers * in_flight(layout, stage, load.micro_batches)
    if load.recompute:
        count += layer  # the one that is being computed again
    if stage == layout.pipeline_parallel - 1:
        # Logits in bf16 and fp32, and the gradient.
        count += load.targets * layout.padded_vocabulary(shape.vocabulary) // ranks * 10
    return round(count)


def memory(
    shape: Shape,
    layout: Layout,
    stage: int,
    ranks: int,
    load: Load,
    vision: int = 0,
    vision_trained: int = 0,
    half: bool = True,
) -> Memory:
    """What one rank of a stage needs.

    Args:
        shape: The language model's sizes.
        layout: How it is laid over the ranks.
        stage: The pipeline stage.
        ranks: All ranks.
        load: What a rank works on.
        vision: Numbers in the vision part.
        vision_trained: How many of them are trained (the projector, where the tower is frozen).
        half: bf16 weights beside the optimizer's fp32 ones; otherwise fp32 ones alone.

    Raises:
        UserError: The layout does not fit the ranks or the layers.
    """
    language = language_weights(shape, layout, stage)
    weights = language + (vision if stage == 0 else 0)
    trained = language + (vision_trained if stage == 0 else 0)
    return Memory(
        weights=(2 if half else 4) * weights,
        gradients=4 * trained,
        optimizer=(12 if half else 8) * trained // layout.data_parallel(ranks),
        activations=(1 if half else 2) * activations(shape, layout, stage, load),
    )
