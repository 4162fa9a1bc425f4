"""The megatron backend: one model over tensor and pipeline parallel ranks, in several copies.

It joins the packed batches and the objectives of every backend with the model, the schedules
and the optimizer of this package. Nothing in it draws random numbers (dropout is refused), so
that a checkpoint is weights, moments and the step count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from hpc.errors import UserError
from insightv import models
from insightv.training.attention import attention_mask, span_table
from insightv.training.backend import Outcome, whole_batch
from insightv.training.checkpoint import Write
from insightv.training.config import TrainConfig
from insightv.training.megatron.families import shape_of
from insightv.training.megatron.model import Inputs, build, initialise, logprobs
from insightv.training.megatron.optimizer import Adam
from insightv.training.megatron.schedule import forward_backward, replicate
from insightv.training.megatron.weights import export, load
from insightv.training.objectives import Objective, Replies, Totals
from insightv.training.packing import Batch, Packer
from insightv.training.ranks import Ranks

SHORT = 512
"""Up to this width attention is one product under a dense mask; beyond, segment by segment."""
_TOKENS = ("input_ids", "position_ids", "mm_token_type_ids")
"""What a batch holds of tokens; the rest of its inputs are pictures."""


class MegatronBackend:
    """A part of one copy of the model; see `insightv.training.backend.Backend`."""

    def __init__(self, folder: Path, config: TrainConfig, ranks: Ranks):
        """Builds this rank's part and reads its weights; a process group must be up.

        Raises:
            UserError: The folder, the layout or the number of ranks cannot be used.
        """
        self._folder, self._layout, self._ranks = folder, config.megatron, ranks
        if config.device == "cpu" and _cuda():
            raise UserError(
                "device=cpu: the megatron backend computes on GPUs where there are some; hide "
                "them with CUDA_VISIBLE_DEVICES="
            )
        self.digest = ranks.first(lambda: models.digest_of(folder))
        self.processor = models.load_processor(folder)
        outline = models.outline(folder)
        if config.freeze_vision:
            models.freeze_vision(outline)
        self._config, self._shape = outline.config, shape_of(outline.config)
        self._layout.validate(self._shape)
        if not config.freeze_vision:
            _draws_nothing(self._config.vision_config)
        if parallel_state.model_parallel_is_initialized():  # of another training in this process
            parallel_state.destroy_model_parallel()
        initialise(self._layout, config.seed)
        self.copies = parallel_state.get_data_parallel_world_size()
        self.copy = parallel_state.get_data_parallel_rank()
        self._first = parallel_state.is_pipeline_first_stage()
        self._speaks = (
            parallel_state.is_pipeline_last_stage()
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        self._device = str(torch.device("cuda", torch.cuda.current_device())) if _cuda() else "cpu"
        self.packer = Packer(
            outline,
            self.processor.tokenizer.pad_token_id,
            config.tokens_per_micro_batch,
            ragged=True,  # all micro-batches of a pipeline have one shape: one row each
            multiple=math.lcm(
                self._layout.tensor_parallel if self._layout.sequence_parallel else 1,
                64 if _cuda() else 1,  # what matrix kernels like
            ),
            alike=self._layout.pipeline_parallel if self._layout.virtual_stages > 1 else 1,
        )
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._pieces = build(self._config, self._layout, dtype, config.recompute)
        load(self._pieces, self._config, self._layout, folder)
        if config.freeze_vision and (vision := self._pieces[0].vision) is not None:
            models.freeze_vision(vision)
            models.vision_tower(vision).eval()
        self._copies = replicate(self._pieces, distributed_optimizer=True)
        self._optimizer = Adam(
            self._copies,
            config.learning_rate,
            (config.beta1, config.beta2),
            config.weight_decay,
            config.grad_clip,
        )

    def step(
        self,
        batches: Sequence[Batch],
        totals: Totals,
        objective: Objective,
        rate: float,
        bound: float = math.inf,
    ) -> Outcome:
        """See `Backend`."""
        shares, parts = self._run(batches, totals, objective)
        loss, replies = whole_batch(self._ranks, self._speaks, shares, parts)
        norm, applied = self._optimizer.step(rate, bound if math.isfinite(loss) else -math.inf)
        return Outcome(loss, norm, applied, objective.metrics(replies) if applied else {})

    def loss(self, batch: Batch, objective: Objective) -> float:
        """See `Backend`."""
        idle = [batch.idle()] * (self.packer.alike - 1)
        shares, _ = self._run([batch, *idle], Totals.of([batch]), objective, backward=False)
        share = torch.stack(shares).sum().item() if self._speaks else None
        told = self._ranks.every(lambda: [self.copy, share])
        return next(found for copy, found in told if copy == self.copy and found is not None)

    def _run(
        self, batches: Sequence[Batch], totals: Totals, objective: Objective, backward: bool = True
    ) -> tuple[list[Tensor], list[Replies]]:
        """Micro-batches through the stages; on the last one their shares of the loss."""
        batches = [self._placed(batch) for batch in batches]

        def share(logits: Tensor, number: int) -> tuple[Tensor, tuple[Tensor, Replies | None]]:
            batch = batches[number]
            value, part = objective.share(logprobs(logits, batch.targets), batch, totals)
            return value, (value.detach().clone(), part)

        inputs = [self._inputs(batch) for batch in batches]
        found = forward_backward(self._copies, inputs, share, backward)
        return [value for value, _ in found], [part for _, part in found if part is not None]

    def _placed(self, batch: Batch) -> Batch:
        """On this rank's device; pictures go to the first stage only."""
        if not self._first:
            tokens = {name: value for name, value in batch.inputs.items() if name in _TOKENS}
            batch = replace(batch, inputs=tokens)
        return batch.to(self._device)

    def _inputs(self, batch: Batch) -> Inputs:
        mask: Any = attention_mask(batch, "dense") if batch.width <= SHORT else span_table(batch)
        pictures = {name: value for name, value in batch.inputs.items() if name not in _TOKENS}
        tokens, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
        return Inputs(tokens, positions, mask, pictures, batch.places)

    def snapshot(self) -> Write:
        """See `Backend`; what it writes, any layout resumes."""
        return self._optimizer.snapshot(self._pieces, self._shape, self._layout)

    def resume(self, folder: Path) -> None:
        """See `Backend`.

        Raises:
            UserError: The checkpoint is of another model.
        """
        self._optimizer.resume(self._pieces, self._shape, self._layout, folder)

    def export(self, folder: Path) -> None:
        """See `Backend`; names, configuration and processor are those of the base's folder."""
        export(self._pieces, self._config, self._layout, self._folder, folder)


def _draws_nothing(vision: Any) -> None:
    for name, value in vision.to_dict().items():
        if "dropout" in name and value:
            raise UserError(
                f"the megatron backend does not compute {name} of the vision tower ({value}): set "
                "it to 0 in the model's config.json, or freeze_vision=true"
            )


def _cuda() -> bool:
    return torch.cuda.is_available()
