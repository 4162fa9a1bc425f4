"""The supported families: what their configurations ask for, and their tensors' names.

The language models are one table, `LANGUAGE` and `LAYER`: each row names a megatron-core
parameter, how it is cut over tensor parallel ranks, and the Hugging Face tensors it is made
of. Families differ in where these tensors, and those of the vision part, stand in a folder;
that is one `Dialect` for each spelling in use. Vision tower and projector keep their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from hpc.errors import UserError
from insightv.training.megatron.layout import Shape


class Cut(Enum):
    """How a parameter is made of Hugging Face tensors and cut over tensor parallel ranks."""

    WHOLE = "the same on every rank"
    ROWS = "rows cut"
    COLUMNS = "columns cut"
    GATED = "rows of gate and up cut apart, then stacked on each rank"
    HEADS = "queries, keys and values stacked group by group, groups cut"


@dataclass(frozen=True)
class Row:
    """One megatron-core parameter and the Hugging Face tensors in it, in order."""

    name: str
    cut: Cut
    tensors: tuple[str, ...]


LANGUAGE = (
    Row("embedding.word_embeddings.weight", Cut.ROWS, ("embed_tokens.weight",)),
    Row("decoder.final_layernorm.weight", Cut.WHOLE, ("norm.weight",)),
    Row("output_layer.weight", Cut.ROWS, ("lm_head.weight",)),
)
"""Outside the layers; ``lm_head`` stands apart in every dialect."""

_QKV = ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}")
LAYER = (
    Row("input_layernorm.weight", Cut.WHOLE, ("input_layernorm.weight",)),
    Row(
        "self_attention.linear_qkv.weight",
        Cut.HEADS,
        tuple(name.format("weight") for name in _QKV),
    ),
    Row("self_attention.linear_qkv.bias", Cut.HEADS, tuple(name.format("bias") for name in _QKV)),
    Row("self_attention.q_layernorm.weight", Cut.WHOLE, ("self_attn.q_norm.weight",)),
    Row("self_attention.k_layernorm.weight", Cut.WHOLE, ("self_attn.k_norm.weight",)),
    Row("self_attention.linear_proj.weight", Cut.COLUMNS, ("self_attn.o_proj.weight",)),
    Row("pre_mlp_layernorm.weight", Cut.WHOLE, ("post_attention_layernorm.weight",)),
    Row("mlp.linear_fc1.weight", Cut.GATED, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    Row("mlp.linear_fc2.weight", Cut.COLUMNS, ("mlp.down_proj.weight",)),
)
"""Inside layer i (``decoder.layers.i`` and ``layers.i``); absent ones are passed over."""


@dataclass(frozen=True)
class Dialect:
    """A spelling of names in a folder.

    Attributes:
        language: What stands before the language model's names.
        head: Of the output matrix.
        vision: What stands before the vision part's names.
        spelled: Parts of the vision part's names that are spelled otherwise: (here, there).
    """

    language: str
    head: str
    vision: str
    spelled: tuple[tuple[str, str], ...] = ()


_TOWER = (("vision_tower.", "vision_tower.vision_model."),)  # before transformers 5
_LLAVA = (
    Dialect("language_model.model.", "language_model.lm_head.weight", ""),
    Dialect("language_model.model.", "language_model.lm_head.weight", "", _TOWER),
    Dialect("model.language_model.", "lm_head.weight", "model."),
    Dialect("model.language_model.", "lm_head.weight", "model.", _TOWER),
)
_QWEN = (
    Dialect("model.", "lm_head.weight", ""),
    Dialect("model.language_model.", "lm_head.weight", "model."),
)
FAMILIES: dict[str, tuple[Dialect, ...]] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
}
"""By ``model_type``; a family's dialects in the order in which they are tried."""

LANGUAGES = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3")
IGNORED = ("rotary_emb.inv_freq", "position_ids")
"""Ends of the names of constants that old folders hold and models compute themselves."""


def dialect_of(model_type: str, has: Callable[[str], bool], vision: list[str]) -> Dialect:
    """The spelling a folder uses.

    Args:
        model_type: Of the model's configuration.
        has: Whether the folder holds a tensor.
        vision: Names of the vision part's tensors, as the module itself has them.

    Raises:
        UserError: The family is not supported, or no spelling fits.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"no megatron backend for {model_type!r}: use one of {', '.join(FAMILIES)}, or the "
            "torch or deepspeed backend"
        )
    dialects = [one for one in FAMILIES[model_type] if has(one.language + "embed_tokens.weight")]
    if not dialects:
        raise UserError(f"the weights hold no token embedding by a name that {model_type} uses")
    return max(dialects, key=lambda one: sum(has(vision_name(one, name)) for name in vision))


def vision_name(dialect: Dialect, name: str) -> str:
    """Where a tensor of the vision part stands in a folder."""
    for here, there in dialect.spelled:
        if name.startswith(here):
            name = there + name[len(here) :]
    return dialect.vision + name


def language_name(dialect: Dialect, name: str) -> str:
    """Where a tensor of the language model stands in a folder."""
    return dialect.head if name == "lm_head.weight" else dialect.language + name


def shape_of(config: Any) -> Shape:
    """The sizes of a vision-language model's language model, if megatron-core can compute it.

    Args:
        config: A transformers configuration of the whole model.

    Raises:
        UserError: It computes something that the table above does not.
    """
    text = config.get_text_config()
    kind = text.model_type
    rope = text.rope_parameters
    wrong = {
        f"language model {kind!r} (known: {', '.join(LANGUAGES)})": kind not in LANGUAGES,
        f"activation {text.hidden_act!r} (known: silu)": text.hidden_act != "silu",
        "sliding-window attention": _slides(text),
        "attention_dropout": bool(text.attention_dropout),
        "a bias in attention_bias": bool(getattr(text, "attention_bias", False)),
        "mlp_bias": bool(getattr(text, "mlp_bias", False)),
        f"rope type {rope['rope_type']!r}": rope["rope_type"] in ("dynamic", "longrope"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for what, found in wrong.items():
        if found:
            raise UserError(
                f"the megatron backend does not compute {what}: use the torch or deepspeed backend"
            )
    return any_shape_of(config)


def any_shape_of(config: Any) -> Shape:
    """The sizes of a vision-language model's language model, whatever else it computes."""
    text = config.get_text_config()
    kind, heads = text.model_type, text.num_attention_heads
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        feed_forward=text.intermediate_size,
        heads=heads,
        groups=text.num_key_value_heads,
        head=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        tied=is_tied(config),
        bias=kind.startswith("qwen2"),
        qk_norm=kind == "qwen3",
    )


def is_tied(config: Any) -> bool:
    """Whether embedding and head are one matrix: what the whole model's configuration says."""
    return bool(config.tie_word_embeddings)


def _slides(text: Any) -> bool:
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return text.model_type == "mistral" and text.sliding_window is not None


def sizes_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that the table names; those in a layer without the layer's prefix."""
    hidden, queries, keys = shape.hidden, shape.heads * shape.head, shape.groups * shape.head
    sizes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (shape.vocabulary, hidden),
        "lm_head.weight": (shape.vocabulary, hidden),
        "norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (shape.feed_forward, hidden),
        "mlp.up_proj.weight": (shape.feed_forward, hidden),
        "mlp.down_proj.weight": (hidden, shape.feed_forward),
    }
    if shape.bias:
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            sizes[f"self_attn.{name}_proj.bias"] = (size,)
    if shape.qk_norm:
        sizes["self_attn.q_norm.weight"] = sizes["self_attn.k_norm.weight"] = (shape.head,)
    return sizes


def tensors_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a language model; a tied head is none of them."""
    sizes = sizes_of(shape)
    outside = {name for row in LANGUAGE for name in row.tensors}
    if shape.tied:
        outside.remove("lm_head.weight")
    tensors = {name: sizes[name] for name in sorted(outside)}
    for layer in range(shape.layers):
        for row in LAYER:
            for name in row.tensors:
                if name in sizes:
                    tensors[f"layers.{layer}.{name}"] = sizes[name]
    return tensors
