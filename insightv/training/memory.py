"""How much memory a rank of any backend needs, before anything is loaded.

Weights, gradients and optimizer states are counted from the base's configuration and the heads
of its files; activations, and what is exchanged at once, are estimated
(`insightv.training.megatron.estimate`). Nothing here is measured, and what an allocator wastes,
the pictures and the activations of a vision tower that is trained are not in it: a training that
does not fit by these numbers does not fit; one that just does may not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from insightv.folders import PROJECTORS, TOWERS, tensor_shapes
from insightv.training.config import TrainConfig
from insightv.training.deepspeed.starting import BUCKET
from insightv.training.megatron import estimate
from insightv.training.megatron.estimate import Load, Memory
from insightv.training.megatron.families import any_shape_of
from insightv.training.megatron.layout import Layout, Shape
from insightv.training.policy import LOGITS

TARGETS = 0.25
"""Share of a micro-batch's tokens that are targets: pictures and questions are the most of it."""
LIVE = 10**9
"""Numbers that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Base:
    """A model, as far as memory depends on it.

    Attributes:
        config: A transformers configuration.
        shape: The language model's sizes.
        vision: Numbers in tower and projector.
        projector: How many of them are trained where the tower is frozen.
        names: The tensors of its files.
    """

    config: Any
    shape: Shape
    vision: int
    projector: int
    names: frozenset[str]


def base_of(folder: Path) -> Base:
    """Looks at a model folder; no tensor is read.

    Raises:
        OSError: There is none.
        ValueError: It is damaged, or of a kind that this transformers does not know.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    shape, sizes = any_shape_of(config), tensor_shapes(folder)
    numbers = {name: math.prod(size) for name, size in sizes.items()}
    tower = sum(count for name, count in numbers.items() if _frozen(name))
    vision = max(sum(numbers.values()) - estimate.language_weights(shape, Layout(), 0), tower)
    return Base(config, shape, vision, vision - tower, frozenset(sizes))


def _frozen(name: str) -> bool:
    """Whether a tensor is the vision tower's own, as `insightv.models.freeze_vision` has it."""
    parts = set(name.split("."))
    return bool(parts & set(TOWERS)) and not parts & set(PROJECTORS)


def needed(training: TrainConfig, base: Base, ranks: int) -> Memory:
    """What the fullest of so many ranks needs.

    Raises:
        UserError: The layout does not fit the ranks or the layers.
    """
    half = training.precision == "bf16"
    trained = base.projector if training.freeze_vision else base.vision
    tokens = training.tokens_per_micro_batch
    if training.backend == "megatron":
        layout = training.megatron
        share = math.ceil(training.batch_size / layout.data_parallel(ranks))
        load = Load(tokens, round(TARGETS * tokens), share, training.recompute)
        stages = (
            estimate.memory(base.shape, layout, stage, ranks, load, base.vision, trained, half)
            for stage in range(layout.pipeline_parallel)
        )
        return max(stages, key=lambda memory: memory.total)
    targets = min(round(TARGETS * tokens), LOGITS // base.shape.vocabulary)
    load = Load(tokens, targets, 1, training.recompute)
    kept = estimate.activations(base.shape, Layout(), 0, load) * (1 if half else 2)
    language = estimate.language_weights(base.shape, Layout(), 0)
    weights, trained = language + base.vision, language + trained
    if training.backend == "deepspeed":
        cut = training.deepspeed
        return zero(weights, trained, ranks, cut.zero_stage, cut.offload, half, kept)
    # Fp32 weights, and under autocast a copy of what is trained in bf16.
    return Memory(4 * weights + 2 * trained * half, 4 * trained, 8 * trained, kept)


def zero(
    weights: int,
    trained: int,
    ranks: int,
    stage: int,
    offload: bool = False,
    half: bool = True,
    activations: int = 0,
) -> Memory:
    """What a rank needs under ZeRO (arXiv 1910.02054, section 5).

    There weights and gradients take 2 bytes each and the optimizer 12, of which stage 1 cuts the
    optimizer's over ranks, stage 2 the gradients' and stage 3 the weights' as well. The deepspeed
    backend sums gradients in fp32, so they take 4.

    Args:
        weights: Numbers in the model.
        trained: How many of them are trained.
        ranks: All ranks.
        stage: 1, 2 or 3.
        offload: Optimizer states and the gradients they are made from stay on the node.
        half: bf16 weights beside the optimizer's fp32 ones; otherwise fp32.
        activations: Bytes of them.
    """
    each = 2 if half else 4
    gradients = 4 * trained // (ranks if stage > 1 else 1)
    buffers = 8 * min(trained, BUCKET)
    if stage == 3:
        buffers += each * min(weights, LIVE)
    return Memory(
        weights=each * weights // (ranks if stage == 3 else 1),
        gradients=0 if offload else gradients,
        optimizer=0 if offload else 12 * trained // ranks,
        activations=activations,
        buffers=buffers,
    )
