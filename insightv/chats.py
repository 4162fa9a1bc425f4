"""Chats and pictures as a model's tokens and tensors, by the habits of its processor."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from hpc.errors import RecordError, one_line
from insightv.records import Message


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
    """One chat, unpadded.

    Attributes:
        ids: Its tokens.
        marks: Per-token values, by name.
        pictures: Its pictures' tensors.
        opening: Tokens up to the end of the last picture.
    """

    ids: list[int]
    marks: dict[str, list[int]]
    pictures: tuple[EncodedPicture, ...]
    opening: int = 0


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    least = min(len(one), len(other))
    return bisect_left(range(least), True, key=lambda at: one[: at + 1] != other[: at + 1])


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
        raise RecordError(f"the chat template refuses the chat: {one_line(error)}") from None


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
    # Not all that are special have a role by which transformers lists them: Llama 3's headers.
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in {*special, *tokenizer.all_special_tokens, getattr(processor, "image_token", "")}:
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
        raise RecordError(f"the model takes no picture of {size}: {one_line(error)}") from None
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
    opening = 0
    marks: dict[str, list[int]] = {name: [] for name in names}
    rest = iter(encoded)
    for token in unexpanded:
        if token == placeholder:
            picture = next(rest)
            ids += picture.ids
            for name, values in marks.items():
                values += picture.marks[name]
            opening = len(ids)
        else:
            ids.append(token)
            for values in marks.values():
                values.append(0)
    return Encoding(ids, marks, encoded, opening)


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
