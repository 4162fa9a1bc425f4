"""The deepspeed backend: ZeRO-1, 2 and 3, every rank a data parallel copy.

DeepSpeed divides gradients by ranks and losses by accumulation steps; here a loss is a share of
the global batch's, so the one is undone and the other switched off. Its own checkpoints are
pickles that fit one layout. Ours are safetensors of the fp32 weights and moments under the
tensors' names: what some ranks wrote, any number of ranks reads.

Ranks that hold weights together must run the same modules in the same order, or they wait for
each other for ever. Three things could differ between their micro-batches, and are made alike:
how many there are (`plan`), whether a picture is among them (`PicturePacker`), and in how many
pieces the head is applied (``most`` of `token_logps`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from hpc.errors import UserError
from insightv import chats, models
from insightv.training.backend import Outcome, whole_batch
from insightv.training.config import TrainConfig
from insightv.training.folder import Writer, finish
from insightv.training.objectives import Objective, Replies, Totals
from insightv.training.packing import Batch, Packer, Planned, Tree
from insightv.training.ranks import Ranks
from insightv.training.torch_backend import LogProbs

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 10**8
"""Numbers that are exchanged at once: 0.4 GB."""
_BLANK = -1
"""The number of the tree that stands in where a micro-batch has no picture."""


@dataclass(frozen=True)
class Part:
    """Where this rank holds its part of a trained tensor.

    Attributes:
        flat: The fp32 weights of many tensors; the optimizer's state goes by it.
        at: Where the part begins in ``flat``.
        start: Where it begins in the tensor, flattened.
        count: Its numbers.
    """

    flat: Tensor
    at: int
    start: int
    count: int


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
        deepspeed = _imported(config.device)
        self.copies, self.copy = ranks.count, ranks.rank
        self._ranks, self._folder = ranks, folder
        self._cut = config.deepspeed.zero_stage == 3
        dtype = "bfloat16" if config.precision == "bf16" else "float32"
        settings = _settings(config)
        with _cut_while_loading(settings) if self._cut else nullcontext():
            loaded = models.load(folder, device=config.device, dtype=dtype)
        self.processor, self.digest, model = loaded.processor, loaded.digest, loaded.model
        self._device = str(model.device)
        self._skeleton = _skeleton(folder, config)  # a model that is cut does not know its shapes
        pad_token, budget = loaded.tokenizer.pad_token_id, config.tokens_per_micro_batch
        self.packer: Packer = PicturePacker(self._skeleton, loaded.processor, pad_token, budget)
        torch.manual_seed(config.seed + self.copy)  # dropout, where a model has any
        model.train()
        if config.freeze_vision:
            models.freeze_vision(model)
            models.vision_tower(model).eval()
        if config.recompute:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        if not trained:
            raise UserError(f"{folder}: every tensor is frozen, nothing is left to train")
        self.model = model
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # it reports memory
            self._engine, *_ = deepspeed.initialize(
                args=SimpleNamespace(device_rank=model.device.index or 0),
                model=_Policy(model),
                model_parameters=trained,
                optimizer=_adam(config),
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
        with _norms_up_to(bound, self._engine.optimizer) as norms:
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

    def save(self, folder: Path) -> None:
        """Every rank writes its parts: fp32 weights, moments, its random state."""
        tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
        if self._device.startswith("cuda"):
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        places = {}
        for name, weight, part in self._parts():
            places[name] = [part.start, part.count, _size(weight)]
            for kind, flat in self._states(part.flat).items():
                tensors[f"{kind}.{name}"] = flat[part.at : part.at + part.count]
        described = {"ranks": self.copies, "steps": self._steps(), "places": places}
        save_file(
            {name: tensor.detach().cpu() for name, tensor in tensors.items()},
            folder / f"zero-{self.copy:05d}.safetensors",
            metadata={"zero": json.dumps(described)},
        )

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
            state = saved.random(self.copy)
            torch.set_rng_state(state["random.cpu"])
            if self._device.startswith("cuda") and "random.cuda" in state:
                torch.cuda.set_rng_state(state["random.cuda"])

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
                writer.add(_file_name(self._skeleton, name), whole.cpu())
        if self._ranks.lead:
            kept = self.model.state_dict().keys()
            for name, buffer in self.model.named_buffers():
                if name in kept:
                    writer.add(_file_name(self._skeleton, name), buffer.cpu())
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


class Saved:
    """A checkpoint's parts, whichever ranks wrote them.

    Attributes:
        ranks: How many wrote it.
        steps: Optimizer steps behind it.
        sizes: How many numbers each trained tensor has.
    """

    def __init__(self, folder: Path):
        """Opens every file; nothing is read but their headers.

        Raises:
            UserError: One is missing or damaged.
        """
        self.sizes: dict[str, int] = {}
        self._pieces: dict[str, list[tuple[Any, int, int]]] = {}
        self._files = []
        for path in sorted(folder.glob("zero-*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
                described = json.loads(file.metadata()["zero"])
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"checkpoint {path} is damaged ({error}); remove it") from None
            self._files.append(file)
            self.ranks, self.steps = int(described["ranks"]), int(described["steps"])
            for name, (start, count, size) in described["places"].items():
                self.sizes[name] = size
                self._pieces.setdefault(name, []).append((file, start, count))
        if not self._files or len(self._files) != self.ranks:
            raise UserError(f"checkpoint {folder} is not whole: it lacks files; remove it")

    def read(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Fills ``into`` with the numbers of a tensor from ``start`` on."""
        stop = start + len(into)
        for file, first, count in self._pieces[name]:
            a, b = max(start, first), min(stop, first + count)
            if a < b:
                piece = file.get_slice(f"{kind}.{name}")[a - first : b - first]
                into[a - start : b - start] = piece.to(into.device)

    def random(self, rank: int) -> dict[str, Tensor]:
        """A rank's random states, by name."""
        file = self._files[rank]
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith("random.")}  # noqa: SIM118


class PicturePacker(Packer):
    """Packs so that every micro-batch shows the model a picture.

    What trains on one rank only would be waited for on the others. So where a micro-batch has no
    picture, a small blank one goes with it, seen by nobody and without targets: its gradients
    are zeros.
    """

    def __init__(self, model: Any, processor: Any, pad_token: int, budget: int):
        """As `Packer`; ``processor`` prepares the blank picture."""
        super().__init__(model, pad_token, budget)
        shown = chats.encode_picture(processor, Image.new("RGB", (56, 56)))
        self._blank = Tree(
            key="",
            ids=shown.ids,
            marks=shown.marks,
            pictures=(shown,),
            positions=self.positions(chats.Encoding(shown.ids, shown.marks, (shown,))),
            lengths=(len(shown.ids),),
            places=[],
            targets=[],
            owners=[],
            replies=0,
            reference=(),
            unshared=len(shown.ids),
        )

    def alone(self, tree: Tree) -> Batch:
        """As `Packer.alone`."""
        return self.made([Planned([[0]])], lambda number: tree)[0]

    def made(self, planned: Sequence[Planned], trees: Callable[[int], Tree]) -> list[Batch]:
        """As `Packer.made`."""

        def tree(number: int) -> Tree:
            return self._blank if number == _BLANK else trees(number)

        def shown(one: Planned) -> Planned:
            if any(trees(number).pictures for row in one.rows for number in row):
                return one
            rows = sorted(one.rows, key=lambda row: sum(len(trees(n).ids) for n in row))
            return one._replace(rows=[*rows[1:], [*rows[0], _BLANK]])

        return super().made([shown(one) for one in planned], tree)


class _Policy(nn.Module):
    """Log-probabilities as a module: what it calls is seen by DeepSpeed's hooks."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        # In the weights' own type: DeepSpeed holds bf16 ones beside their fp32 originals.
        self._logps = LogProbs(model, "fp32")

    def forward(self, batch: Batch, most: int) -> Tensor:
        return self._logps(batch, most)


def _imported(device: str) -> Any:
    """The deepspeed package, set up for one device.

    Raises:
        UserError: It is not installed.
    """
    if models.pick_device(device) == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import accelerate  # noqa: F401  (transformers cuts a model through it)
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"backend=deepspeed needs {error.name}: pip install -e '.[deepspeed]'"
        ) from None
    # It calls functions that torch 2.13 has newer names for.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Nothing is compiled on the nodes: the extension it would build speeds up inference only.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It keeps the groups of an earlier training, which are gone with it.
    deepspeed.utils.groups._release_process_group_references(None)
    return deepspeed


def _settings(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {
        "stage": config.deepspeed.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.deepspeed.offload:
        pinned = models.pick_device(config.device).startswith("cuda")
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,  # ours are made by tokens; this divides nothing
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        # Gradients are summed in fp32, over micro-batches and over ranks.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        # torch's AdamW runs on a CPU too, without anything to compile.
        "zero_force_ds_cpu_optimizer": False,
    }


def _adam(config: TrainConfig) -> Callable[[Any], torch.optim.Optimizer]:
    def build(weights: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            weights,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    return build


@contextmanager
def _norms_up_to(bound: float, optimizer: Any) -> Iterator[list[float]]:
    """Lets DeepSpeed take a gradient norm above ``bound`` for one that is no number (0.19.8).

    Each of its optimizers asks that of the global norm, the same on all ranks, before it changes
    anything; and then leaves the step out.

    Yields:
        The norm, once it is known; nothing if it is no number.
    """
    module: Any = sys.modules[type(optimizer).__module__]
    invalid, norms = module.is_invalid_grad_norm, []

    def refused(norm: Tensor) -> bool:
        if invalid(norm):
            return True
        norms.append(float(norm))
        return norms[-1] > bound

    module.is_invalid_grad_norm = refused
    try:
        yield norms
    finally:
        module.is_invalid_grad_norm = invalid


@contextmanager
def _cut_while_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Models that transformers loads meanwhile are cut over the ranks, tensor by tensor."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(settings)  # transformers holds a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


def _skeleton(folder: Path, config: TrainConfig) -> Any:
    """The model without its weights."""
    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    if config.freeze_vision:
        models.freeze_vision(model)
    return model


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
