"""The architectures of the real bases, written down from their published configurations.

Numbers only: on the meta device a model of 72 billion parameters takes no memory. Tokenizers are
the tiny families' own; picture processors have the real settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as T
from families import make_tokenizer

ROPE = {"rope_type": "default", "rope_theta": 1e6}


def _text(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocab: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_parameters": ROPE,
    }


def _mrope(text: dict, *sections: int, interleaved: bool = False) -> dict:
    rope = ROPE | {"mrope_section": list(sections)}
    return text | {"rope_parameters": rope | ({"mrope_interleaved": True} if interleaved else {})}


def llava_next_llama3_8b() -> T.LlavaNextConfig:
    return T.LlavaNextConfig(
        vision_config=T.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=T.LlamaConfig(
            **_text(4096, 14336, 32, 32, 8, 128320) | {"max_position_embeddings": 8192}
        ),
        image_token_index=128256,
    )


def llava_onevision_qwen2_7b() -> T.LlavaOnevisionConfig:
    return T.LlavaOnevisionConfig(
        vision_config=T.SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=T.Qwen2Config(**_text(3584, 18944, 28, 28, 4, 152064)),
    )


def _qwen2_5_vl(text: dict, tower: int, tied: bool = False) -> T.Qwen2_5_VLConfig:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": tower,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    text = _mrope(text, 16, 24, 24) | {"max_position_embeddings": 128000}
    return T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def qwen2_5_vl_3b() -> T.Qwen2_5_VLConfig:
    return _qwen2_5_vl(_text(2048, 11008, 36, 16, 2, 151936), 3420, tied=True)


def qwen2_5_vl_7b() -> T.Qwen2_5_VLConfig:
    return _qwen2_5_vl(_text(3584, 18944, 28, 28, 4, 152064), 3420)


def qwen2_5_vl_32b() -> T.Qwen2_5_VLConfig:
    return _qwen2_5_vl(_text(5120, 27648, 64, 40, 8, 152064), 3456)


def qwen2_5_vl_72b() -> T.Qwen2_5_VLConfig:
    return _qwen2_5_vl(_text(8192, 29568, 80, 64, 8, 152064), 3456)


def qwen2_vl_72b() -> T.Qwen2VLConfig:
    return T.Qwen2VLConfig(
        text_config=_mrope(_text(8192, 29568, 80, 64, 8, 152064), 16, 24, 24),
        vision_config={
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "hidden_size": 8192,
            "patch_size": 14,
        },
    )


def qwen3_vl_8b() -> T.Qwen3VLConfig:
    return T.Qwen3VLConfig(
        text_config=_mrope(
            _text(4096, 12288, 36, 32, 8, 151936) | {"head_dim": 128},
            *(24, 20, 20),
            interleaved=True,
        )
        | {"max_position_embeddings": 262144},
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    )


def qwen2_5_72b() -> T.Qwen2Config:
    return T.Qwen2Config(**_text(8192, 29568, 80, 64, 8, 152064))


ARCHITECTURES: dict[str, tuple[Callable[[], Any], int]] = {
    "llava-hf/llama3-llava-next-8b-hf": (llava_next_llama3_8b, 8_355_276_800),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (llava_onevision_qwen2_7b, 8_030_348_832),
    "Qwen/Qwen2.5-VL-3B-Instruct": (qwen2_5_vl_3b, 3_754_622_976),
    "Qwen/Qwen2.5-VL-7B-Instruct": (qwen2_5_vl_7b, 8_292_166_656),
    "Qwen/Qwen2.5-VL-32B-Instruct": (qwen2_5_vl_32b, 33_452_718_336),
    "Qwen/Qwen2.5-VL-72B-Instruct": (qwen2_5_vl_72b, 73_410_777_344),
    "Qwen/Qwen2-VL-72B-Instruct": (qwen2_vl_72b, 73_405_560_320),
    "Qwen/Qwen2.5-72B-Instruct": (qwen2_5_72b, 72_706_203_648),
    "Qwen/Qwen3-VL-8B-Instruct": (qwen3_vl_8b, 8_767_123_696),
}
"""By name on the hub: the configuration, and its parameters.

They are as many as the hub counts; of LLaVA-NeXT, LLaVA-OneVision and Qwen2.5-VL-72B, whose
counts were not found elsewhere, as many as this architecture has.
"""


def processor(hub: str) -> Any:
    """A processor with a base's real settings for pictures."""
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if "next" in hub:
        tiles = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        return T.LlavaNextProcessor(
            LlavaNextImageProcessorPil(
                size={"shortest_edge": 336},
                crop_size={"height": 336, "width": 336},
                image_grid_pinpoints=tiles,
            ),
            make_tokenizer(("<image>",)),
            patch_size=14,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
        )
    if "onevision" in hub:
        tiles = [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)]
        return T.LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessorPil(
                size={"height": 384, "width": 384}, image_grid_pinpoints=tiles
            ),
            make_tokenizer(("<image>", "<video>")),
            num_image_tokens=729,
            vision_feature_select_strategy="full",
        )
    patch, kind = (16, T.Qwen3VLProcessor) if "Qwen3" in hub else (14, T.Qwen2_5_VLProcessor)
    edges = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 16384 * (2 * patch) ** 2}
    pads = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return kind(
        Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=edges), make_tokenizer(pads)
    )
