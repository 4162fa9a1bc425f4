"""Model folders in Hugging Face format: loading, saving, and where their parts are.

With `insightv.chats` everything that depends on a model family's habits: the picture processor
without torchvision here, the chat template there.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from hpc.disk import share, unreadable
from hpc.errors import UserError, one_line
from insightv.folders import PROJECTORS, TOWERS, gguf_parts, is_gguf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
_PACKABLE = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose language model is plainly causal, and for which packing is tested."""
_CONTEXT = 4096
"""For models whose configuration does not tell their longest input."""


def _do_without_video() -> None:
    """Lets processors of picture-and-video families load where torchvision is absent.

    Their video half exists only as a torchvision class, and a processor demands each of its
    parts by class. Without torchvision that part is dropped from the list of parts, for
    loading and for saving; pictures go through the PIL processors as before.
    """
    if find_spec("torchvision") is not None:
        return
    mixin: Any = ProcessorMixin
    listed = mixin.get_attributes.__func__

    def get_attributes(cls: type) -> list[str]:
        return [name for name in listed(cls) if "video" not in name]

    mixin.get_attributes = classmethod(get_attributes)


_do_without_video()
logging.disable_progress_bar()  # bars over loading weights; the stages have their own


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory.

    Attributes:
        model: In evaluation mode, on its device.
        processor: Pictures and text to tensors.
        tokenizer: The processor's tokenizer; pads on the left.
        digest: SHA-256 (16 hex digits) over configuration and weights.
    """

    model: Any
    processor: Any
    tokenizer: Any
    digest: str


def load(folder: str | Path, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Loads a model folder for inference; code that came with the weights is never run.

    Args:
        folder: A folder in Hugging Face format, weights in safetensors.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, …
        dtype: ``auto`` (bfloat16 on a GPU, else float32) or a name in ``DTYPES``.

    Raises:
        UserError: The folder is missing, not a model, damaged, or of an unsupported kind.
    """
    path, digest = Path(folder), digest_of(folder)
    device = pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in DTYPES:
        raise UserError(f"no dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    auto: Any = AutoModelForImageTextToText
    try:
        model, info = auto.from_pretrained(
            path, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    except _UNLOADABLE as error:
        raise UserError(f"model folder {path} cannot be loaded: {one_line(error)}") from None
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"weights in {path} are damaged or do not fit: {one_line(error)}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"weights in {path} lack {len(missing)} tensors, e.g. {missing[0]}")
    processor = load_processor(path)
    return LoadedModel(model.to(device).eval(), processor, processor.tokenizer, digest)


def load_processor(path: Path) -> Any:
    """The processor of a model folder; its tokenizer pads, on the left.

    Raises:
        UserError: It has none for pictures and text.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, **_LOCAL)
    except _UNLOADABLE as error:
        raise UserError(f"model folder {path} cannot be loaded: {one_line(error)}") from None
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_token"):
        raise UserError(f"model folder {path} has no processor for pictures and text")
    if not processor.chat_template:
        raise UserError(f"model folder {path} has no chat template: add a chat_template.jinja")
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def outline(path: Path) -> Any:
    """A model without its weights: its configuration, its code, and the shapes of its tensors.

    Raises:
        UserError: The folder is no model.
    """
    auto: Any = AutoModelForImageTextToText
    try:
        config = AutoConfig.from_pretrained(path, **_LOCAL)
        with torch.device("meta"):
            return auto.from_config(config)
    except _UNLOADABLE as error:
        raise UserError(f"model folder {path} cannot be loaded: {one_line(error)}") from None


def save(model: Any, processor: Any, folder: str | Path) -> None:
    """Writes a folder that ``load`` (and transformers) reads again."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # transformers imports deepspeed where it is installed, whatever backend trained.
    with deepspeed_told(torch.cuda.is_available()):
        model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    # The settings of a video part that was not loaded here would be lost to those who have it.
    source = Path(processor.tokenizer.name_or_path or ".")
    target = folder / "video_preprocessor_config.json"
    settings = _video_settings(source) if not hasattr(processor, "video_processor") else None
    if settings is not None and not target.exists():
        target.write_text(json.dumps(settings, indent=2))
    share(folder)


@contextmanager
def deepspeed_told(gpu: bool, **variables: str) -> Iterator[None]:
    """Answers by environment variables what deepspeed asks for when it is imported or started.

    What somebody has set stays; the others are gone afterwards.

    Args:
        gpu: Whether it may look for a GPU; without one it complains.
        variables: What else it asks for.
    """
    wanted = variables if gpu else {"DS_ACCELERATOR": "cpu", **variables}
    missing = wanted.keys() - os.environ.keys()
    os.environ |= {name: wanted[name] for name in missing}
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _video_settings(folder: Path) -> dict[str, Any] | None:
    """The video processor's settings in a model folder, wherever its version keeps them."""
    for name in ("processor_config.json", "video_preprocessor_config.json"):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text())
            if name != "processor_config.json":
                return settings
            if isinstance(settings.get("video_processor"), dict):
                return settings["video_processor"]
    return None


def digest_of(folder: str | Path) -> str:
    """SHA-256 (16 hex digits) over a model folder's ``config.json`` and safetensors, or a GGUF.

    Raises:
        UserError: The folder is missing, is no model folder, or may not be read.
    """
    path = Path(folder)
    if is_gguf(path):
        return _digest_of(path, gguf_parts(path))
    if not path.is_dir():
        raise UserError(f"no model folder {path}: give a folder in Hugging Face format")
    config = path / "config.json"
    try:
        json.loads(config.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is no model folder: it has no config.json") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{config} cannot be read: {one_line(error)}") from None
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{path} has no *.safetensors; other formats of weights are not read")
    return _digest_of(path, [config, *weights])


def _digest_of(path: Path, files: Sequence[Path]) -> str:
    try:
        return _digest(
            tuple(
                (str(file.resolve()), stat.st_mtime_ns, stat.st_size)
                for file in files
                for stat in [file.stat()]
            )
        )
    except OSError as error:
        raise unreadable(Path(error.filename or path), error) from None


@lru_cache(maxsize=64)
def _digest(stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Hashes the files; time and size in the key make a changed file a new entry."""
    total = hashlib.sha256()
    for name, _, size in stamps:
        total.update(f"{Path(name).name}\x1f{size}\x1f".encode())
        with Path(name).open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]


def longest_input(model: Any) -> int:
    """The longest input that a model, a model folder or a GGUF was made for, in tokens.

    Raises:
        UserError: The folder's configuration cannot be read.
    """
    if isinstance(model, str | Path) and is_gguf(Path(model)):
        return _gguf_context(Path(model))
    if isinstance(model, str | Path):
        try:
            config = AutoConfig.from_pretrained(Path(model), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{model}/config.json cannot be read: {one_line(error)}") from None
    else:
        config = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None) or _CONTEXT


def _gguf_context(path: Path) -> int:
    try:
        from transformers.integrations.gguf import read_gguf_metadata

        told, _ = read_gguf_metadata(str(path))
    except (*_UNLOADABLE, IndexError, struct.error) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return int(told.get(f"{told['general.architecture']}.context_length") or _CONTEXT)


def pick_device(device: str) -> str:
    """``auto`` made concrete; other names are checked.

    Raises:
        UserError: The name is no device, or a GPU is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"no device {device!r}: use auto, cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} asks for a GPU and there is none: use auto or cpu")
    return device


def load_renderer(folder: str | Path) -> Any:
    """What turns chats into tokens, without the weights: a processor, or a text tokenizer.

    A GGUF holds its tokenizer; one that transformers cannot make of it may lie beside it.

    Raises:
        UserError: There is neither, or no chat template.
    """
    path = Path(folder)
    try:
        if is_gguf(path):
            processor = PreTrainedTokenizerFast.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
        else:
            processor = AutoProcessor.from_pretrained(path, **_LOCAL)
    except (*_UNLOADABLE, IndexError, struct.error) as error:
        hint = "; put its tokenizer.json beside it" if is_gguf(path) else ""
        raise UserError(f"model {path} has no tokenizer: {one_line(error)}{hint}") from None
    if not processor.chat_template:
        raise UserError(f"model {path} has no chat template: add a chat_template.jinja")
    return processor


def check_packable(model: Any) -> None:
    """Refuses models whose attention is more than `a token sees those before it`.

    Raises:
        UserError: The family is not known to be, or some of its layers see a window only.
    """
    kind, text = model.config.model_type, model.config.get_text_config()
    if kind not in _PACKABLE:
        raise UserError(f"models of type {kind} cannot be trained: use {', '.join(_PACKABLE)}")
    window = getattr(text, "sliding_window", None)
    layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if window or layers:
        seen = f"a window of {window} tokens" if window else ", ".join(sorted(layers))
        raise UserError(f"the {kind} model has layers that see {seen}: they cannot be trained")


def freeze_vision(model: Any) -> int:
    """Freezes the vision tower; the projector behind it and the language model go on learning.

    Where the projector lives inside the tower's module (Qwen2.5-VL's ``merger``), it stays
    trainable.

    Returns:
        How many parameters were frozen.

    Raises:
        UserError: No vision tower was found.
    """
    frozen = 0
    for name, parameter in vision_tower(model).named_parameters():
        if not any(part in PROJECTORS for part in name.split(".")):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


def vision_tower(model: Any) -> torch.nn.Module:
    """The module that sees: ``vision_tower`` (LLaVA), ``visual`` (Qwen), ``vision_model``.

    Raises:
        UserError: The model has none of them.
    """
    for module in _shells(model):
        for name in TOWERS:
            tower = getattr(module, name, None)
            if isinstance(tower, torch.nn.Module):
                return tower
    raise UserError(f"{type(model).__name__} has no vision tower by a known name: {TOWERS}")


def _shells(model: Any) -> Iterator[Any]:
    """The model and what it wraps."""
    while isinstance(model, torch.nn.Module):
        yield model
        model = getattr(model, "model", None)
