"""How a model is laid over ranks: arithmetic only, no torch, no megatron-core.

Ranks are numbered tensor first, then data, then pipeline (megatron-core's ``tp-cp-ep-dp-pp``),
so that tensor parallel ranks are neighbours on one node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc.config import unhashed
from hpc.errors import UserError


@dataclass
class Layout:
    """Which part of the model a rank holds; no choice here changes a result.

    What remains of the ranks is data parallel.

    Attributes:
        tensor_parallel: Ranks that share every matrix; at most the GPUs of a node.
        pipeline_parallel: Stages of consecutive layers.
        virtual_stages: Chunks a stage holds in the interleaved schedule (arXiv 2104.04473);
            1 is plain 1F1B.
        sequence_parallel: Norms and residuals are split over the sequence among tensor
            parallel ranks (arXiv 2205.05198): less activation memory at the same traffic.
        layers: Layers of each stage, first to last; with virtual stages of each chunk, chunk
            by chunk. Empty splits evenly, counting the vision tower as ``vision_layers``.
        vision_layers: What the vision tower and projector cost on the first stage, in layers
            of the language model, when layers are split evenly.
    """

    tensor_parallel: int = unhashed(1)
    pipeline_parallel: int = unhashed(1)
    virtual_stages: int = unhashed(1)
    sequence_parallel: bool = unhashed(False)
    layers: list[int] = field(default_factory=list, metadata={"hashed": False})
    vision_layers: int = unhashed(0)

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def chunks(self) -> int:
        """Pieces the layers are cut into."""
        return self.pipeline_parallel * self.virtual_stages

    def data_parallel(self, ranks: int) -> int:
        """Copies of the model on so many ranks.

        Raises:
            UserError: The ranks cannot be divided into whole copies.
        """
        self._check_sizes()
        if ranks == 1 < self.model_ranks:
            raise UserError(
                f"megatron.tensor_parallel x pipeline_parallel is {self.model_ranks}, and this is "
                f"one process: start it as `torchrun --nproc-per-node {self.model_ranks} -m "
                "insightv train …`, or in a chain on a cluster whose profile gives trainings so "
                "many nodes x tasks"
            )
        if ranks % self.model_ranks:
            raise UserError(
                f"{ranks} ranks hold no whole number of copies of the model: megatron."
                f"tensor_parallel x pipeline_parallel is {self.model_ranks}; change one of them"
            )
        return ranks // self.model_ranks

    def validate(self, shape: Shape) -> None:
        """Refuses what megatron-core would compute wrong, or not at all.

        Raises:
            UserError: The line names the setting.
        """
        self._check_sizes()
        tensor = self.tensor_parallel
        if self.vision_layers < 0:
            raise UserError(f"megatron.vision_layers is {self.vision_layers}: expected 0 or more")
        if self.virtual_stages > 1 and self.pipeline_parallel == 1:
            raise UserError("megatron.virtual_stages needs pipeline_parallel above 1")
        if self.sequence_parallel and tensor == 1:
            raise UserError("megatron.sequence_parallel needs tensor_parallel above 1")
        for what, size in (
            ("attention heads", shape.heads),
            ("key-value heads", shape.groups),
            ("feed-forward size", shape.feed_forward),
        ):
            if size % tensor:
                raise UserError(
                    f"megatron.tensor_parallel is {tensor}, which does not divide the model's "
                    f"{size} {what}"
                )
        self.split(shape.layers)

    def _check_sizes(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel", "virtual_stages"):
            if getattr(self, name) < 1:
                raise UserError(f"megatron.{name} is {getattr(self, name)}: expected at least 1")

    def split(self, layers: int) -> list[int]:
        """Layers of each chunk, in the order of the model.

        Raises:
            UserError: ``layers`` are set and do not add up, or a chunk would be empty.
        """
        if self.layers:
            if len(self.layers) != self.chunks or sum(self.layers) != layers:
                raise UserError(
                    f"megatron.layers is {self.layers}: expected {self.chunks} numbers that add "
                    f"up to the model's {layers} layers"
                )
            split = list(self.layers)
        else:
            even, rest = divmod(layers + self.vision_layers, self.chunks)
            # The first chunks have the pictures, the last the logits: the middle takes the rest.
            middle = sorted(range(self.chunks), key=lambda i: abs(2 * i - self.chunks + 1))
            split = [even + (i in middle[:rest]) for i in range(self.chunks)]
            split[0] -= self.vision_layers
        if min(split) < 1:
            raise UserError(
                f"{layers} layers over {self.chunks} pipeline chunks leave one without a layer "
                f"({split}): lower megatron.pipeline_parallel, virtual_stages or vision_layers"
            )
        return split

    def stage_layers(self, layers: int, stage: int) -> list[int]:
        """The layer numbers, from 0, that a pipeline stage holds."""
        held: list[int] = []
        first = 0
        for chunk, count in enumerate(self.split(layers)):
            if chunk % self.pipeline_parallel == stage:
                held += range(first, first + count)
            first += count
        return held

    def padded_vocabulary(self, vocabulary: int) -> int:
        """Rows of the embedding, a multiple of 64 on each tensor parallel rank.

        With one rank it is the model's own. The rows behind the vocabulary are zeros that no
        softmax counts and no export writes.
        """
        if self.tensor_parallel == 1:
            return vocabulary
        multiple = 64 * self.tensor_parallel
        return -(-vocabulary // multiple) * multiple


@dataclass(frozen=True)
class Shape:
    """The sizes of a language model that layouts ask for.

    Attributes:
        layers: Decoder layers.
        hidden: Width of the residual stream.
        feed_forward: Width inside the gated feed-forward layer.
        heads: Attention heads.
        groups: Key-value heads.
        head: Width of a head.
        vocabulary: Tokens.
        tied: Whether embedding and head are one matrix.
        bias: Whether queries, keys and values have biases.
        qk_norm: Whether queries and keys are normalised.
    """

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    tied: bool
    bias: bool
    qk_norm: bool
