"""The deepspeed backend: a model cut over all ranks, every one a data parallel copy.

DeepSpeed divides gradients by ranks and losses by accumulation steps; here a loss is a share of
the global batch's, so the one is undone and the other switched off.

Ranks that hold weights together must run the same modules in the same order, or they wait for
each other for ever. Three things could differ between their micro-batches, and are made alike:
how many there are (`plan`), whether a picture is among them (`PicturePacker`), and in how many
pieces the head is applied (``most`` of `token_logps`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from hpc.errors import UserError
from insightv import models
from insightv.training.backend import Outcome, whole_batch
from insightv.training.checkpoint import Write, copied
from insightv.training.config import TrainConfig
from insightv.training.deepspeed import starting
from insightv.training.deepspeed.checkpoint import Part, Saved, write
from insightv.training.deepspeed.packer import PicturePacker
from insightv.training.folder import Writer, finish
from insightv.training.objectives import Objective, Replies, Totals
from insightv.training.packing import Batch, Packer
from insightv.training.policy import (
    LogProbs,
    adamw,
    prepare,
    random_states,
    set_random_states,
)
from insightv.training.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Policy(nn.Module):
    """Log-probabilities as a module: what it calls is seen by DeepSpeed's hooks."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        # In the weights' own type: DeepSpeed holds bf16 ones beside their fp32 originals.
        self._logps = LogProbs(model, "fp32")

    def forward(self, batch: Batch, most: int) -> Tensor:
        return self._logps(batch, most)


class DeepSpeedBackend:
    """A model cut over all ranks; see `insightv.training.backend.Backend`."""

    def __init__(self, folder: Path, config: TrainConfig, ranks: Ranks):
        """Loads the model and cuts it.

        Args:
            folder: A model in Hugging Face format.
            config: Of the training; ``deepspeed`` says how the model is cut.
            ranks: Those of the default process group.

        Raises:
            UserError: deepspeed is not installed, the folder is no model, or nothing in it is
                left to train.
        """
        self.copies, self.copy = ranks.count, ranks.rank
        self._ranks, self._folder = ranks, folder
        self._cut = config.deepspeed.zero_stage == 3
        self._outline = models.outline(folder)  # a model that is cut does not know its shapes
        if config.freeze_vision:
            models.freeze_vision(self._outline)
        gpu = models.pick_device(config.device) != "cpu"
        # A LOCAL_RANK that stayed would make other libraries look for a rendezvous.
        with models.deepspeed_told(gpu, LOCAL_RANK="0"):
            self._start(config)

    def _start(self, config: TrainConfig) -> None:
        deepspeed, settings = starting.imported(), starting.settings_of(config)
        dtype = "bfloat16" if config.precision == "bf16" else "float32"
        with starting.cut_while_loading(settings) if self._cut else nullcontext():
            loaded = models.load(self._folder, device=config.device, dtype=dtype)
        self.processor, self.digest, self.model = loaded.processor, loaded.digest, loaded.model
        self._device = str(self.model.device)
        pad_token, budget = loaded.tokenizer.pad_token_id, config.tokens_per_micro_batch
        self.packer: Packer = PicturePacker(self._outline, loaded.processor, pad_token, budget)
        torch.manual_seed(config.seed + self.copy)  # dropout, where a model has any
        trained = prepare(self.model, config, self._folder)
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # it reports memory
            self._engine, *_ = deepspeed.initialize(
                args=SimpleNamespace(device_rank=self.model.device.index or 0),
                model=_Policy(self.model),
                model_parameters=list(trained.values()),
                optimizer=lambda weights: adamw(weights, config),
                config=settings,
                dist_init_required=False,
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
        losses: list[Tensor] = []
        parts: list[Replies] = []
        loss, replies = 0.0, parts
        last = len(batches) - 1
        for number, (batch, most) in enumerate(zip(batches, self._most(batches), strict=True)):
            self._engine.set_gradient_accumulation_boundary(number == last)
            batch = batch.to(self._device)
            share, part = objective.share(self._engine(batch, most), batch, totals)
            losses.append(share.detach())
            if part is not None:
                parts.append(part)
            if number == last:
                loss, replies = whole_batch(self._ranks, True, losses, parts)
                if not math.isfinite(loss):
                    share = share * math.nan  # so that every rank's step is left out
            self._engine.backward(share * self.copies)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        with starting.norms_up_to(bound, self._engine.optimizer) as norms:
            self._engine.step()
        if not self._engine.was_step_applied():
            # DeepSpeed 0.19.8 adds the next step's offloaded gradients to these.
            sums = getattr(self._engine.optimizer, "averaged_gradients", {})
            sums.update(dict.fromkeys(sums))
            return Outcome(loss, norms[0] if norms else math.inf, False, {})
        return Outcome(loss, norms[0], True, objective.metrics(replies))

    @torch.no_grad()
    def loss(self, batch: Batch, objective: Objective) -> float:
        """See `Backend`."""
        [most] = self._most([batch])
        batch = batch.to(self._device)
        logps = self._engine(batch, most)
        return objective.share(logps, batch, Totals.of([batch]))[0].item()

    def _most(self, batches: Sequence[Batch]) -> list[int]:
        """For each micro-batch, the most targets that any rank has in its own."""
        told = self._ranks.every(lambda: [len(batch.targets) for batch in batches])
        return [max(counts) for counts in zip(*told, strict=True)]

    def snapshot(self) -> Write:
        """Every rank writes its parts: fp32 weights, moments, its random state."""
        tensors, places = random_states(self._device), {}
        for name, weight, part in self._parts():
            places[name] = [part.start, part.count, _size(weight)]
            for kind, flat in self._states(part.flat).items():
                tensors[f"{kind}.{name}"] = flat[part.at : part.at + part.count]
        copies, steps = copied(tensors), self._steps()
        name = f"zero-{self.copy:05d}.safetensors"
        return lambda folder: write(folder / name, self.copies, steps, places, copies)

    @torch.no_grad()
    def resume(self, folder: Path) -> None:
        """See `Backend`; the number of ranks and the stage may be others than when it was saved.

        Raises:
            UserError: The checkpoint is damaged, or of another model.
        """
        saved = Saved(folder)
        sizes = {name: _size(weight) for name, weight in self._trained()}
        if saved.sizes != sizes:
            odd = sorted(saved.sizes.items() ^ sizes.items())[0][0]
            raise UserError(f"checkpoint {folder} is of another model ({odd} differs); remove it")
        if self._cut:
            self._engine.optimizer.checkpoint_event_prologue()
        self._ranks.every(lambda: self._read(saved))
        self._spread()
        if saved.ranks == self.copies:
            set_random_states(saved.random(self.copy), self._device)

    def _read(self, saved: Saved) -> None:
        for name, _, part in self._parts():
            if saved.steps and not self._states(part.flat, MOMENTS):
                state = self._engine.basic_optimizer.state[part.flat]
                state |= {kind: torch.zeros_like(part.flat) for kind in MOMENTS}
                state["step"] = _count(part.flat, saved.steps)
            for kind, flat in self._states(part.flat).items():
                saved.read(kind, name, part.start, flat[part.at : part.at + part.count])

    def export(self, folder: Path) -> None:
        """The first rank writes the fp32 weights, gathered one tensor at a time."""
        writer = Writer(folder, 0)
        parts = {name: part for name, _, part in self._parts()}
        for name, weight in self.model.named_parameters():
            whole = self._whole(weight, parts.get(name))
            if self._ranks.lead:
                writer.add(_file_name(self._outline, name), whole.cpu())
        if self._ranks.lead:
            kept = self.model.state_dict().keys()
            for name, buffer in self.model.named_buffers():
                if name in kept:
                    writer.add(_file_name(self._outline, name), buffer.cpu())
            writer.close()
            writer.check()
            finish(self._folder, folder, "float32")

    @torch.no_grad()
    def _whole(self, weight: nn.Parameter, part: Part | None) -> Tensor:
        """A tensor in fp32, on every rank."""
        if not weight.requires_grad:
            with self._gathered(weight):
                return weight.detach().float().clone()
        whole = torch.zeros(_size(weight), device=self._device)
        if part is not None:
            held = part.flat[part.at : part.at + part.count]
            whole[part.start : part.start + part.count] = held
        # Each number stands on one rank, zeros on the others: the sum is exact.
        distributed.all_reduce(whole)
        return whole.view(getattr(weight, "ds_shape", weight.shape))

    def _gathered(self, weight: nn.Parameter) -> AbstractContextManager[None]:
        if not self._cut:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([weight])
        return gathered

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((k, v) for k, v in self.model.named_parameters() if v.requires_grad)

    def _parts(self) -> Iterator[tuple[str, nn.Parameter, Part]]:
        """This rank's parts of the trained tensors; of some it has none."""
        optimizer = self._engine.optimizer
        for name, weight in self._trained():
            if self._cut:
                group, at, count = optimizer.grad_position[optimizer.get_param_id(weight)]
                start = self.copy * count
                count = min(count, _size(weight) - start)  # the last parts are filled up
                if count > 0:
                    yield (
                        name,
                        weight,
                        Part(optimizer.fp32_partitioned_groups_flat[group], at, start, count),
                    )
            elif (held := getattr(weight, "_hp_mapping", None)) is not None:
                groups = self._engine.basic_optimizer.param_groups
                [flat] = groups[held.param_group_index]["params"]
                place = held.hp_fragment_address
                yield (
                    name,
                    weight,
                    Part(flat, place.start, held.lp_fragment_address.start, place.numel),
                )

    def _states(
        self, flat: Tensor, kinds: Sequence[str] = ("weight", *MOMENTS)
    ) -> dict[str, Tensor]:
        """The flat tensors that belong to flat weights: themselves and their moments, if any."""
        found = {"weight": flat.detach(), **self._engine.basic_optimizer.state.get(flat, {})}
        return {kind: found[kind] for kind in kinds if kind in found}

    def _steps(self) -> int:
        """How many steps were taken; 0 before the optimizer has states."""
        states = self._engine.basic_optimizer.state.values()
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def _spread(self) -> None:
        """Makes the weights that compute from the fp32 ones, on all ranks."""
        optimizer = self._engine.optimizer
        if not self._cut:
            optimizer.update_lp_params()
            return
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


def _file_name(model: Any, name: str) -> str:
    """How a tensor is called in the files that transformers writes."""
    from transformers.core_model_loading import revert_weight_conversion

    called: str = next(iter(revert_weight_conversion(model, {name: torch.empty(0)})))
    return called


def _size(weight: Tensor) -> int:
    """How many numbers a tensor has, cut or whole."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def _count(flat: Tensor, steps: int) -> Tensor:
    """AdamW's step counter, where its fused form keeps it."""
    return torch.tensor(float(steps), device=flat.device)
