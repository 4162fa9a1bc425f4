"""Builds the embedded model from nothing: a small LLaVA with a closed vocabulary of words.

Vision: a SigLIP-like transformer, 128 × 128 pixels in patches of 16 (64 picture tokens).
Language: a Llama. Both are plain transformers classes; nothing here is needed to load or
run the shipped folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from insightv.demo.charts import SIZE

PATCH = 16
TOKENS = (SIZE // PATCH) ** 2
"""Picture tokens."""
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
FRAMES = (
    '{"title": "',
    '", "content": "',
    '", "next_action": "continue"}',
    '", "next_action": "summary"}',
    '{"path":',
    ', "logic":',
    ', "grounding":',
    ', "completeness":',
    ', "total":',
    ', "bad_steps": [',
    "]}",
    "\n",
)
"""Fixed parts of the project's JSON: one token each, so that paths are some 45 tokens long."""
CHAT = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}<user>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% else %}<assistant>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{{ c['text'] }}{% endfor %}{% endif %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""The chat template: one token marks each turn, a reply ends with ``</s>``."""


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer in which every given word and every number up to 100 is one token.

    Words carry the space before them, also at the start of a text or after a frame (the
    decoder takes it out again), so that a label is the same token wherever it stands.
    Whatever is not in the vocabulary falls back to characters, then to bytes.

    Args:
        words: The closed vocabulary; repeats are allowed.
    """
    known = sorted({*words, *map(str, range(101))})
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary += [("▁" + word, -1.0) for word in known]
    vocabulary += [(character, -8.0) for character in characters] + [("▁", -8.0)]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    # The opening quote or bracket of a frame is not followed by a space.
    tidy = [decoders.Replace(end + " ", end) for end in ('": "', "[", "\n")]
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Replace("▁", " "),
            decoders.Fuse(),
            *tidy,
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens(list(FRAMES))
    return fast


def words_of(texts: Iterable[str]) -> set[str]:
    """The words of texts, without the punctuation around them; ``(A)`` and ``[1]`` stay whole."""
    found: set[str] = set()
    for text in texts:
        for frame in FRAMES:
            text = text.replace(frame, " ")
        for word in text.split():
            if re.fullmatch(r"\(\w\)[,.]?|\[\d\]", word):
                found.add(word.rstrip(",."))
            elif re.search(r"[A-Za-z]", word):
                found.add(word.strip(",.?:;\"'"))
            elif not re.search(r"\d", word):
                found.add(word)
    return {word for word in found if word}


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Processor with a PIL picture pipeline (no torchvision)."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pictures = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token="<image>",
        num_additional_image_tokens=0,
        chat_template=CHAT,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model, 2.6 million parameters."""
    picture: Any = tokenizer.convert_tokens_to_ids("<image>")
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )
    ids: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1536,
        tie_word_embeddings=True,
        initializer_range=0.04,
        **ids,
    )
    names: dict[str, Any] = {"image_token_id": picture}  # beside image_token_index, its old name
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=picture,
        **names,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        image_seq_length=TOKENS,
    )
    return LlavaForConditionalGeneration(config)
