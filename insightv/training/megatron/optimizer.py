"""Adam over a layout, its states cut over data parallel copies, and checkpoints of both.

A checkpoint is safetensors under the tensors' Hugging Face names, cut and joined by the same
spans as weights (`insightv.training.megatron.weights`). So it knows no layout: what one wrote,
any other reads. megatron-core's own format is not used. Its index is a pickle, and the resume of
its distributed optimizer without Transformer Engine gives all parameters one shared step
counter (0.16.1), after which losses are silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, distributed

from hpc.errors import UserError
from insightv.training.checkpoint import Write
from insightv.training.folder import Writer
from insightv.training.megatron import cpu
from insightv.training.megatron.folders import Folder
from insightv.training.megatron.layout import Layout, Shape
from insightv.training.megatron.model import VisionLanguageModel
from insightv.training.megatron.weights import parameters, parts, stage_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam:
    """AdamW of megatron-core's distributed optimizer (ZeRO-1, fp32 weights and moments)."""

    def __init__(
        self,
        models: Sequence[Any],
        rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip: float = 0.0,
    ):
        """Takes over the weights as they are now; load them first.

        Args:
            models: From `replicate` with ``distributed_optimizer``.
            rate: Learning rate; each step may give another.
            betas: Of the moments.
            weight_decay: On every tensor, as the other backends do.
            clip: Largest global gradient norm; 0 leaves gradients as they are.
        """
        self._models, self._clip = list(models), clip or math.inf
        config = OptimizerConfig(
            optimizer="adam",
            lr=rate,
            adam_beta1=betas[0],
            adam_beta2=betas[1],
            weight_decay=weight_decay,
            clip_grad=self._clip,
            bf16=models[0].config.bf16,
            params_dtype=models[0].config.params_dtype,
            use_distributed_optimizer=True,
        )
        with cpu.calls():
            self._whole = get_megatron_optimizer(
                config, self._models, use_gloo_process_groups=False
            )
        self._each = getattr(self._whole, "chained_optimizers", [self._whole])

    def step(self, rate: float, bound: float = math.inf) -> tuple[float, bool]:
        """Takes a step from the gradients of `forward_backward`.

        Args:
            rate: Learning rate.
            bound: Largest norm with which weights are changed; the same on every rank.

        Returns:
            The global gradient norm before clipping, and whether weights were changed: they
            are not if the norm is no number, or above ``bound``.
        """
        with cpu.calls():
            self._whole.prepare_grads()
            norm = float(self._whole.clip_grad_norm(self._clip))
            if not (math.isfinite(norm) and norm <= bound):
                return norm, False
            for group in self._whole.param_groups:
                group["lr"] = rate
            self._whole.step_with_ready_grads()
        return norm, True

    def snapshot(
        self, pieces: Sequence[VisionLanguageModel], shape: Shape, layout: Layout
    ) -> Write:
        """Gathers fp32 weights, moments and the step count; every rank must call it.

        A stage's tensors are spread over its copies, on the first tensor parallel rank of each.

        Args:
            pieces: This rank's part of the model.
            shape: The language model's sizes.
            layout: How it is laid over the ranks.

        Returns:
            Writes this rank's share, into a folder on a file system that all ranks see.
        """
        copy = parallel_state.get_data_parallel_rank()
        copies = parallel_state.get_data_parallel_world_size()
        held: dict[str, Tensor] = {}
        for kind in ("weight", *MOMENTS):
            tensors = stage_tensors(pieces, shape, layout, partial(self._gathered, kind=kind))
            for number, (name, tensor) in enumerate(tensors):
                if number % copies == copy:
                    held[f"{kind}.{name}"] = tensor
        if distributed.get_rank() == 0:
            held["step"] = torch.tensor(self._steps())
        stage = parallel_state.get_pipeline_model_parallel_rank()

        def write(folder: Path) -> None:
            writer = Writer(folder, stage * copies + copy)
            for name, tensor in held.items():
                writer.add(name, tensor)
            writer.close()
            writer.check()

        return write

    @torch.no_grad()
    def resume(
        self,
        pieces: Sequence[VisionLanguageModel],
        shape: Shape,
        layout: Layout,
        folder: Path,
    ) -> None:
        """Goes back to what `snapshot` was of, under this or another layout.

        What is not trained is not in it, and comes from the folder training began from.

        Raises:
            UserError: The checkpoint is damaged, or of a model with other trained tensors.
        """
        saved = Folder(folder)
        rank = parallel_state.get_tensor_model_parallel_rank()
        step = int(saved.whole("step")) if "step" in saved.shapes else -1
        if step < 0:
            raise UserError(f"{folder} is no whole checkpoint: it has no step count")
        for piece in pieces:
            for row, before, parameter in parameters(piece):
                if parameter.requires_grad:
                    values = {}
                    for kind in ("weight", *MOMENTS):
                        values[kind] = torch.zeros(parameter.shape)
                        for span, part in parts(row, shape, layout, rank, values[kind]):
                            name = f"{kind}.language.{before}{span.tensor}"
                            part.copy_(saved.read(self._known(saved, name), span))
                    self._set(parameter, values, step)
            for name, parameter in _vision(piece):
                values = {
                    kind: saved.whole(self._known(saved, f"{kind}.vision.{name}"))
                    for kind in ("weight", *MOMENTS)
                }
                self._set(parameter, values, step)

    @staticmethod
    def _known(saved: Folder, name: str) -> str:
        if name not in saved.shapes:
            raise UserError(f"checkpoint {saved.path} is of another model: it has no {name}")
        return name

    def _held(self, parameter: Tensor) -> tuple[Any, Tensor, slice] | None:
        """The optimizer, fp32 weight and range of a parameter's part on this copy, if any."""
        for one in self._each:
            if parameter in one.model_param_group_index_map:
                group, place = one.model_param_group_index_map[parameter]
                held = one._get_model_param_range_map(parameter)["param"]
                weight = one.optimizer.param_groups[group]["params"][place]
                return one.optimizer, weight, slice(held.start, held.end)
        return None

    def _gathered(self, parameter: Tensor, kind: str) -> Tensor | None:
        """A parameter's fp32 weight or moment, joined over data parallel copies."""
        if not parameter.requires_grad:
            return None
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        held = self._held(parameter)
        if held is not None:
            optimizer, weight, place = held
            state = optimizer.state.get(weight, {})
            if kind == "weight":
                whole[place] = weight.detach()
            elif kind in state:  # not before the first step
                whole[place] = state[kind]
        # Each number stands on one copy, zeros on the others: the sum is exact.
        distributed.all_reduce(whole, group=parallel_state.get_data_parallel_group())
        return whole.view(parameter.shape)

    def _set(self, parameter: Tensor, values: dict[str, Tensor], step: int) -> None:
        parameter.copy_(values["weight"])
        held = self._held(parameter)
        if held is None:
            return
        optimizer, weight, place = held
        weight.copy_(values["weight"].flatten()[place])
        state = optimizer.state[weight]
        for kind in MOMENTS:
            state[kind] = values[kind].flatten()[place].to(weight)
        group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        if "step" in group:  # fused Adam of apex and Transformer Engine
            group["step"] = step
        else:
            state["step"] = torch.tensor(float(step))

    def _steps(self) -> int:
        for one in self._each:
            for group in one.optimizer.param_groups:
                if "step" in group:
                    return int(group["step"])
                for weight in group["params"]:
                    if "step" in one.optimizer.state.get(weight, {}):
                        return int(one.optimizer.state[weight]["step"])
        return 0


def _vision(piece: VisionLanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The vision part's trained parameters."""
    if piece.vision is not None:
        for name, parameter in piece.vision.named_parameters():
            if parameter.requires_grad:
                yield name, parameter
