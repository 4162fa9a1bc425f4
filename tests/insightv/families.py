"""Tiny random-weight models of the supported families, as folders that load like real ones.

``save_family("qwen2.5-vl", folder)`` writes config, safetensors, tokenizer, picture processor
and chat template; ``AutoModelForImageTextToText`` and ``insightv.models.load`` read them.
The weights know nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers import trainers as tokenizer_trainers

import insightv.models  # noqa: F401  (lets processors do without torchvision's video part)

FAMILIES = ("llava", "llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")
FRAMES = (
    '{"title": "',
    '", "content": "',
    '", "next_action": "continue"}',
    '", "next_action": "summary"}',
)
Make = Callable[[tuple[str, ...]], T.PreTrainedTokenizerFast]
"""Makes a tokenizer with these picture tokens."""
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_CORPUS = (
    "What is the value of A? B C D Which bar is the highest lowest largest smallest?",
    "What is the difference between the sum of and? Steps. Answer. Read the chart. Compare.",
    "Write one step at a time. Each step is one JSON object. Look at the picture and answer.",
    "The answer is final reasoning question number title content next_action yes no 0 1 2 3",
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_family(
    family: str,
    folder: Path,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    tile: int = 56,
    words: tuple[str, ...] = (),
) -> Path:
    """Writes one family's tiny model into ``folder``; the same seed gives the same bytes.

    ``tile`` is the side of LLaVA-NeXT's and OneVision's tiles in pixels, 14 of them a patch;
    ``words`` are further texts that are one token each.
    """
    torch.manual_seed(seed)
    build = {
        "llava": _llava,
        "llava-next": partial(_llava_next, tile=tile),
        "llava-onevision": partial(_llava_onevision, tile=tile),
        "qwen2-vl": _qwen2,
        "qwen2.5-vl": _qwen,
        "qwen3-vl": _qwen3,
    }[family]
    model, processor = build(partial(make_tokenizer, words=words), hidden, layers)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    """A reproducible noise picture."""
    values = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def make_tokenizer(
    image_tokens: tuple[str, ...], words: tuple[str, ...] = ()
) -> T.PreTrainedTokenizerFast:
    """A small byte-level BPE; the four JSON frames and ``words`` are single, ordinary tokens."""
    special = [*_SPECIAL, *image_tokens]
    core = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = tokenizer_trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    whole = [*FRAMES, *words]
    core.add_tokens([AddedToken(text, normalized=False, special=False) for text in whole])
    return T.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=[*image_tokens, "<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )


def _language(tokenizer: Any, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.05,
    }


def _clip(size: int = 56) -> T.CLIPVisionConfig:
    return T.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=14,
        projection_dim=32,
        initializer_range=0.1,
    )


def _llava(tokens: Make, hidden: int, layers: int) -> tuple[Any, Any]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tokens(("<image>",))
    config = T.LlavaConfig(
        vision_config=_clip(),
        text_config=T.LlamaConfig(**_language(tokenizer, hidden, layers)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    processor = T.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template="{{ bos_token }}" + _CHATML.replace("IMAGE", "<image>\n"),
    )
    return T.LlavaForConditionalGeneration(config), processor


def _llava_next(tokens: Make, hidden: int, layers: int, tile: int) -> tuple[Any, Any]:
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokenizer = tokens(("<image>",))
    tiles = [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile]]
    config = T.LlavaNextConfig(
        vision_config=_clip(tile),
        text_config=T.LlamaConfig(**_language(tokenizer, hidden, layers)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=tiles,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = T.LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": tile},
            crop_size={"height": tile, "width": tile},
            image_grid_pinpoints=tiles,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template="{{ bos_token }}" + _CHATML.replace("IMAGE", "<image>\n"),
    )
    return T.LlavaNextForConditionalGeneration(config), processor


def _llava_onevision(tokens: Make, hidden: int, layers: int, tile: int) -> tuple[Any, Any]:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer = tokens(("<image>", "<video>"))
    tiles = [[tile * high, tile * wide] for high, wide in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]
    config = T.LlavaOnevisionConfig(
        vision_config=T.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=tile,
            patch_size=14,
            initializer_range=0.1,
        ),
        text_config=T.Qwen2Config(**_language(tokenizer, hidden, layers)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tiles,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = T.LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": tile, "width": tile}, image_grid_pinpoints=tiles
        ),
        tokenizer=tokenizer,
        num_image_tokens=(tile // 14) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_CHATML.replace("IMAGE", "<image>"),
    )
    return T.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(tokens: Make, hidden: int, layers: int) -> tuple[Any, Any]:
    text, ids, processor = _qwen_parts(tokens, T.Qwen2_5_VLProcessor, 14, hidden, layers)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "spatial_merge_size": 2,
        "initializer_range": 0.1,
    }
    config = T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return T.Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen2(tokens: Make, hidden: int, layers: int) -> tuple[Any, Any]:
    text, ids, processor = _qwen_parts(tokens, T.Qwen2VLProcessor, 14, hidden, layers)
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "initializer_range": 0.1,
    }
    config = T.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    return T.Qwen2VLForConditionalGeneration(config), processor


def _qwen3(tokens: Make, hidden: int, layers: int) -> tuple[Any, Any]:
    """Its first layers each get what a layer of the tower sees; M-RoPE's axes interleave.

    What the last layer gets reaches no text, so one layer goes without.
    """
    text, ids, processor = _qwen_parts(tokens, T.Qwen3VLProcessor, 16, hidden, layers)
    text["head_dim"] = hidden // 4
    text["rope_parameters"]["mrope_interleaved"] = True
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1][: layers - 1],
        "initializer_range": 0.1,
    }
    config = T.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    return T.Qwen3VLForConditionalGeneration(config), processor


def _qwen_parts(
    tokens: Make, kind: Any, patch: int, hidden: int, layers: int
) -> tuple[dict[str, Any], dict[str, int], Any]:
    """What the Qwen families share: the language model's settings, token ids, the processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = tokens(_QWEN)
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in _QWEN)
    half = hidden // 8
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    text = {**_language(tokenizer, hidden, layers), "rope_parameters": rope}
    ids = {
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }
    side = 4 * patch
    processor = kind(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=patch,
            merge_size=2,
            size={"shortest_edge": side * side, "longest_edge": 4 * side * side},
        ),
        tokenizer=tokenizer,
        chat_template=_CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return text, ids, processor
