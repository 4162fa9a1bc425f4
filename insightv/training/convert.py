"""A model folder from a checkpoint of a training that has not ended, of any backend.

Checkpoints hold the trained tensors in fp32, under names that know no layout. So neither ranks
nor a GPU is needed: the base is loaded once, and its trained tensors are overwritten.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpc.errors import UserError
from insightv import models
from insightv.training.checkpoint import Position, opened, writing
from insightv.training.deepspeed.checkpoint import Saved

_WEIGHT = "weight."


@torch.no_grad()
def convert(checkpoint: Path, base: Path, out: Path) -> Position:
    """Writes the model of a checkpoint as a Hugging Face folder, in fp32.

    The folder appears whole or not at all. The model is held in memory once, in fp32.

    Args:
        checkpoint: A folder ``checkpoints/step-…``; it must not be removed meanwhile.
        base: The model the training began from: what was not trained comes from it, and so do
            configuration and processor. Another one of the same shapes is not noticed.
        out: The folder to write.

    Returns:
        Where the training stood.

    Raises:
        UserError: The checkpoint is damaged or of a model of other tensors, or ``out`` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: remove it, or choose another --out")
    position = opened(checkpoint)
    loaded = models.load(base, device="cpu", dtype="float32")
    weights = dict(loaded.model.named_parameters())
    taken = set()
    for name, tensor in _trained(checkpoint):
        found = next((known for known in _spellings(name) if known in weights), None)
        if found is None or weights[found].numel() != tensor.numel():
            raise UserError(f"checkpoint {checkpoint} does not fit {base}: {name} differs")
        if tensor.ndim > 1 and tensor.shape != weights[found].shape:
            raise UserError(f"checkpoint {checkpoint} does not fit {base}: {name} differs")
        weights[found].copy_(tensor.view(weights[found].shape))
        taken.add(found)
    if not taken:
        raise UserError(f"checkpoint {checkpoint} has no weights")
    # What was trained is the projector and the language model at least, whole.
    tower = {id(weight) for weight in models.vision_tower(loaded.model).parameters()}
    for name, weight in weights.items():
        if name not in taken and id(weight) not in tower:
            raise UserError(f"checkpoint {checkpoint} does not fit {base}: it has no {name}")
    part = out.with_name(out.name + ".part")
    with writing(out):
        shutil.rmtree(part, ignore_errors=True)
        models.save(loaded.model, loaded.processor, part)
        part.replace(out)
    return position


def _trained(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Each trained tensor by the backend's name; one that lay in ranges comes flat."""
    if list(checkpoint.glob("zero-*.safetensors")):
        saved = Saved(checkpoint)
        for name, size in saved.sizes.items():
            whole = torch.empty(size)
            saved.read("weight", name, 0, whole)
            yield name, whole
        return
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    if name.startswith(_WEIGHT):
                        yield name.removeprefix(_WEIGHT), file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {path} is damaged: {error}") from None


def _spellings(name: str) -> list[str]:
    """What transformers may call a tensor: as it is, or as a megatron checkpoint has it."""
    part, _, rest = name.partition(".")
    megatron = {
        "language": [f"model.language_model.{rest}", rest],  # the head stands by itself
        "vision": [f"model.{rest}"],
    }
    return [*megatron.get(part, []), name]
