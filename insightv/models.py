"""Model folders in Hugging Face format: loading, saving, and turning chats into tensors.

Everything that depends on a model family's habits stands here: the picture processor
without torchvision, the chat template, where the vision tower sits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from hpc.errors import RecordError, UserError
from insightv.records import Message

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
_TOWERS = ("vision_tower", "visual", "vision_model")
_PROJECTORS = ("merger", "deepstack_merger_list")
_PACKABLE = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
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


@dataclass(frozen=True)
class EncodedPicture:
    """One picture as its model wants it.

    Attributes:
        ids: The tokens that stand for it in the text.
        marks: Per-token tensors of the same length (``mm_token_type_ids``), by name.
        tensors: Pixels and sizes, by name; the first dimension counts pictures or patches.
    """

    ids: list[int]
    marks: dict[str, list[int]]
    tensors: dict[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Encoding:
    """One chat: token ids, per-token marks, and its pictures' tensors, unpadded."""

    ids: list[int]
    marks: dict[str, list[int]]
    pictures: tuple[EncodedPicture, ...]


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
        raise UserError(f"model folder {path} cannot be loaded: {_one_line(error)}") from None
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"weights in {path} are damaged or do not fit: {_one_line(error)}"
        ) from None
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
        raise UserError(f"model folder {path} cannot be loaded: {_one_line(error)}") from None
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
        raise UserError(f"model folder {path} cannot be loaded: {_one_line(error)}") from None


def save(model: Any, processor: Any, folder: str | Path) -> None:
    """Writes a folder that ``load`` (and transformers) reads again."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    # The settings of a video part that was not loaded here would be lost to those who have it.
    source = Path(processor.tokenizer.name_or_path or ".")
    target = folder / "video_preprocessor_config.json"
    settings = _video_settings(source) if not hasattr(processor, "video_processor") else None
    if settings is not None and not target.exists():
        target.write_text(json.dumps(settings, indent=2))


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
    """SHA-256 (16 hex digits) over a model folder's ``config.json`` and safetensors.

    Raises:
        UserError: The folder is missing or is no model folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"no model folder {path}: give a folder in Hugging Face format")
    config = path / "config.json"
    try:
        json.loads(config.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is no model folder: it has no config.json") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{config} cannot be read: {_one_line(error)}") from None
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{path} has no *.safetensors; other formats of weights are not read")
    stamps = tuple(
        (str(file.resolve()), stat.st_mtime_ns, stat.st_size)
        for file in [config, *weights]
        for stat in [file.stat()]
    )
    return _digest(stamps)


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
    """The longest input that a model, or a model folder, was made for, in tokens.

    Raises:
        UserError: The folder's configuration cannot be read.
    """
    if isinstance(model, str | Path):
        try:
            config = AutoConfig.from_pretrained(Path(model), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{model}/config.json cannot be read: {_one_line(error)}") from None
    else:
        config = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None) or _CONTEXT


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

    Raises:
        UserError: The folder has neither, or no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(Path(folder), **_LOCAL)
    except _UNLOADABLE as error:
        raise UserError(f"model folder {folder} has no tokenizer: {_one_line(error)}") from None
    if not processor.chat_template:
        raise UserError(f"model folder {folder} has no chat template: add a chat_template.jinja")
    return processor


def render(processor: Any, messages: Sequence[Message], pictures: int) -> str:
    """A chat as the text its model reads, by the processor's own template.

    A chat that ends with a user turn is closed by the header of the reply to come. One that
    ends with an assistant turn stays open at exactly that turn's last character.

    Args:
        processor: Of a loaded model, or a text model's tokenizer.
        messages: The turns.
        pictures: How many picture placeholders the first user turn begins with.
    """
    turns: list[dict[str, Any]] = [
        {"role": m.role, "content": _content(processor, plain(processor, m.text))} for m in messages
    ]
    if pictures:
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] = [{"type": "image"}] * pictures + first["content"]
    last = messages[-1]
    # Templates differ in whether they trim a turn; the end of an open one is put on by hand.
    open_text = plain(processor, last.text) if last.role == "assistant" else ""
    kept = open_text.rstrip()
    if kept:
        turns[-1]["content"] = _content(processor, kept)
        text = processor.apply_chat_template(turns, continue_final_message=True, tokenize=False)
        text = text[: text.rindex(kept) + len(kept)]
    else:
        closed = turns[:-1] if last.role == "assistant" else turns
        text = processor.apply_chat_template(closed, add_generation_prompt=True, tokenize=False)
    return text + open_text[len(kept) :]


def prompt(processor: Any, messages: Sequence[Message], pictures: int) -> str:
    """Like ``render``.

    Raises:
        RecordError: The template refuses the chat.
    """
    try:
        return render(processor, messages, pictures)
    except Exception as error:  # templates raise what they like, jinja errors among it
        raise RecordError(f"the chat template refuses the chat: {_one_line(error)}") from None


def tokens(processor: Any, text: str) -> list[int]:
    """A rendered chat's tokens, one for each picture's placeholder."""
    tokenizer = getattr(processor, "tokenizer", processor)
    bos = tokenizer.bos_token
    whole = bool(bos) and text.startswith(bos)
    ids: list[int] = tokenizer(text, add_special_tokens=not whole)["input_ids"]
    return ids


def _content(processor: Any, text: str) -> list[dict[str, str]] | str:
    """A turn as templates want it: in parts, or, of models that read text alone, as it is."""
    return [{"type": "text", "text": text}] if isinstance(processor, ProcessorMixin) else text


def plain(processor: Any, text: str) -> str:
    """Text in which no control token can be read: ``<image>`` becomes ``< image>``.

    Questions and model output are data; a picture placeholder or an end of turn in them
    would otherwise change the chat's structure.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    for token in {*tokenizer.all_special_tokens, getattr(processor, "image_token", "")}:
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def picture_tokens(processor: Any, image: Image.Image) -> int:
    """How many tokens a picture is, by its size where the processor can tell.

    Raises:
        RecordError: The processor refuses the picture.
    """
    tell = getattr(processor, "_get_num_multimodal_tokens", None)
    if tell is not None:
        try:
            return int(tell(image_sizes=[(image.height, image.width)])["num_image_tokens"][0])
        except (ValueError, ZeroDivisionError, IndexError, TypeError, AttributeError):
            pass  # the picture is refused below, in words
    return len(encode_picture(processor, image).ids)


def encode_picture(processor: Any, image: Image.Image) -> EncodedPicture:
    """Pixels and placeholder tokens of one picture; worth keeping, as it costs the most.

    Raises:
        RecordError: The processor refuses the picture (one pixel wide, say).
    """
    try:
        batch = processor(
            images=[image],
            text=[processor.image_token],
            return_tensors="pt",
            add_special_tokens=False,
        )
    except (ValueError, ZeroDivisionError, IndexError) as error:
        size = f"{image.width}x{image.height}"
        raise RecordError(f"the model takes no picture of {size}: {_one_line(error)}") from None
    ids = batch.pop("input_ids")
    batch.pop("attention_mask", None)
    marks = {name: value[0].tolist() for name, value in batch.items() if value.shape == ids.shape}
    tensors = {name: value for name, value in batch.items() if name not in marks}
    return EncodedPicture(ids[0].tolist(), marks, tensors)


def encode(
    processor: Any, messages: Sequence[Message], pictures: Sequence[Image.Image | EncodedPicture]
) -> Encoding:
    """Tokens and pixels of one chat (see ``render`` for how it ends).

    Raises:
        RecordError: The template refuses the chat, or the processor a picture.
    """
    encoded = tuple(
        p if isinstance(p, EncodedPicture) else encode_picture(processor, p) for p in pictures
    )
    tokenizer = processor.tokenizer
    unexpanded = tokens(processor, prompt(processor, messages, len(encoded)))
    placeholder = tokenizer.convert_tokens_to_ids(processor.image_token)
    if unexpanded.count(placeholder) != len(encoded):
        found = unexpanded.count(placeholder)
        raise RecordError(f"the chat template shows {found} of {len(encoded)} pictures")
    names = dict.fromkeys(name for picture in encoded for name in picture.marks)
    ids: list[int] = []
    marks: dict[str, list[int]] = {name: [] for name in names}
    rest = iter(encoded)
    for token in unexpanded:
        if token == placeholder:
            picture = next(rest)
            ids += picture.ids
            for name, values in marks.items():
                values += picture.marks[name]
        else:
            ids.append(token)
            for values in marks.values():
                values.append(0)
    return Encoding(ids, marks, encoded)


def collate(
    encodings: Sequence[Encoding], pad_token: int, side: str = "left"
) -> dict[str, torch.Tensor]:
    """One padded batch of several chats, ready for ``model(**batch)``.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape (rows, longest), per-token marks of the
        same shape, and the pictures' tensors joined along their first dimension.
    """
    width = max(len(encoding.ids) for encoding in encodings)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        gaps = ([fill] * (width - len(row)) for row in rows)
        pairs = zip(gaps, rows, strict=True)
        return torch.tensor([gap + row if side == "left" else row + gap for gap, row in pairs])

    batch = {
        "input_ids": padded([e.ids for e in encodings], pad_token),
        "attention_mask": padded([[1] * len(e.ids) for e in encodings], 0),
    }
    for name in dict.fromkeys(name for e in encodings for name in e.marks):
        rows = [e.marks.get(name) or [0] * len(e.ids) for e in encodings]
        batch[name] = padded(rows, 0)
    pictures = [picture for encoding in encodings for picture in encoding.pictures]
    return batch | picture_tensors(pictures)


def picture_tensors(pictures: Sequence[EncodedPicture]) -> dict[str, torch.Tensor]:
    """The pictures' tensors by name, joined along their first dimension."""
    names = dict.fromkeys(name for picture in pictures for name in picture.tensors)
    return {name: _joined([picture.tensors[name] for picture in pictures]) for name in names}


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Joins along dimension 0; where dimension 1 differs (tiles a picture), zeros fill up.

    The models skip the filling by the picture's size, which is among their inputs.
    """
    if tensors[0].ndim > 1 and len({tensor.shape[1] for tensor in tensors}) > 1:
        most = max(tensor.shape[1] for tensor in tensors)
        filled = []
        for tensor in tensors:
            shape = (tensor.shape[0], most - tensor.shape[1], *tensor.shape[2:])
            filled.append(torch.cat([tensor, tensor.new_zeros(shape)], dim=1))
        tensors = filled
    return torch.cat(tensors)


def positions(model: Any) -> Callable[[Encoding], torch.Tensor]:
    """How a model numbers the tokens of one chat.

    Returns:
        A function of an encoding to its position ids: [n], or [3, n] (time, height, width)
        for the M-RoPE of the Qwen-VL families, always, also where no picture is.
    """
    index = getattr(model.model, "get_rope_index", None)

    def plain(encoding: Encoding) -> torch.Tensor:
        return torch.arange(len(encoding.ids))

    def spatial(encoding: Encoding) -> torch.Tensor:
        if not encoding.pictures:
            return plain(encoding).expand(3, -1)
        assert index is not None
        kinds = {name: torch.tensor([values]) for name, values in encoding.marks.items()}
        grid = picture_tensors(encoding.pictures)["image_grid_thw"]
        numbered: torch.Tensor = index(torch.tensor([encoding.ids]), image_grid_thw=grid, **kinds)[
            0
        ]
        return numbered[:, 0]

    return plain if index is None else spatial


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
        if not any(part in _PROJECTORS for part in name.split(".")):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


def vision_tower(model: Any) -> torch.nn.Module:
    """The module that sees: ``vision_tower`` (LLaVA), ``visual`` (Qwen), ``vision_model``.

    Raises:
        UserError: The model has none of them.
    """
    for module in _shells(model):
        for name in _TOWERS:
            tower = getattr(module, name, None)
            if isinstance(tower, torch.nn.Module):
                return tower
    raise UserError(f"{type(model).__name__} has no vision tower by a known name: {_TOWERS}")


def _shells(model: Any) -> Iterator[Any]:
    """The model and what it wraps."""
    while isinstance(model, torch.nn.Module):
        yield model
        model = getattr(model, "model", None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
