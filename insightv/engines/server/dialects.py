"""What a request looks like to each kind of server, and what its answer says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hpc.errors import RecordError, UserError
from insightv.engines.base import Completion, Request
from insightv.engines.server.client import Garbled, excerpt, whole

DIALECTS_TOLD = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp"}
"""The dialect by who owns the models that a server lists."""
_THOUGHTS = ("reasoning_content", "reasoning")
"""Where servers with a reasoning parser put what comes before the answer."""
_FINISHES = {"stop": "stop", "eos": "stop", "length": "length"}
_SEEDS = 2**32 - 1
"""llama.cpp keeps 32 bits of a seed; all of them set mean `none given`."""


def payload(
    dialect: str,
    model: str,
    request: Request,
    texts: Sequence[str],
    shown: Sequence[str],
    prompt: str,
    limit: int,
    stops: bool = True,
) -> bytes:
    """The body of a chat request.

    Args:
        dialect: The server's.
        model: What it calls the model.
        request: The call.
        texts: Its turns' texts, in which no control token can be read.
        shown: Its pictures as data URLs.
        prompt: The whole prompt as text, rendered by the model's own template.
        limit: Most tokens.
        stops: Whether the server can be told stop strings. Where it cannot, a text goes on behind
            them, and is cut here.

    Raises:
        UserError: The server cannot do what is asked.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": _messages(request, texts, shown),
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": request.seed,
    }
    if request.stop and stops:
        body["stop"] = list(request.stop)
    going_on = request.messages[-1].role == "assistant"
    if dialect == "transformers":
        del body["temperature"], body["top_p"]
        body |= _for_transformers(request, prompt)
    elif dialect in ("vllm", "sglang"):
        # Their defaults are those of the model's own folder; here each request is explicit.
        body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": sampling.repetition_penalty}
        if going_on:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    elif going_on:
        raise UserError(
            f"the server's dialect is {dialect}, which cannot go on with a turn: use mode single, "
            "or give engine.server.dialect"
        )
    elif sampling.repetition_penalty != 1:
        raise UserError(f"the server's dialect is {dialect}, which has no repetition_penalty")
    elif dialect == "llamacpp":
        # What a request does not say would be a top_k and a min_p of its own.
        body |= {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": request.seed % _SEEDS}
    return json.dumps(body).encode()


def _messages(request: Request, texts: Sequence[str], shown: Sequence[str]) -> list[dict[str, Any]]:
    """The turns, in parts as the protocol has them; the pictures begin the first user turn."""
    turns: list[dict[str, Any]] = []
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in shown]
    for message, text in zip(request.messages, texts, strict=True):
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if message.role == "user":
            parts, pictures = [*pictures, *parts], []
        turns.append({"role": message.role, "content": parts})
    return turns


def _for_transformers(request: Request, prompt: str) -> dict[str, Any]:
    """What `transformers serve` must be told beside the protocol.

    It never draws unless the model's own settings say so, it cannot go on with a turn, and it
    refuses fields that it does not know. It takes whole settings, though, and a template: one
    that repeats the prompt as it was rendered here.
    """
    sampling = request.sampling
    settings: dict[str, Any] = {"do_sample": sampling.temperature > 0, "top_k": 0}
    if sampling.temperature > 0:
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.repetition_penalty != 1:
        settings["repetition_penalty"] = sampling.repetition_penalty
    return {
        "generation_config": json.dumps(settings),
        "chat_template_kwargs": {"chat_template": "{{ whole_prompt }}", "whole_prompt": prompt},
    }


def read(answer: Any, request: Request) -> Completion:
    """The completion in an answer; its text ends before the first stop string.

    Raises:
        Garbled: It is none.
        RecordError: The server ended it for a reason of its own.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text = message["content"] or ""
        told = choice["finish_reason"]
        tokens = answer["usage"]["completion_tokens"]
    except (KeyError, IndexError, TypeError):
        raise Garbled(f"an answer without a completion: {excerpt(json.dumps(answer))}") from None
    counted = isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens < 2**31
    if not isinstance(text, str) or not counted:
        raise Garbled(f"an answer without a text: {excerpt(json.dumps(choice))}")
    text = whole(text)
    found = [place for stop in request.stop if stop and (place := text.find(stop)) >= 0]
    if found:
        return Completion(text[: min(found)], tokens, "stop")
    if told == "abort":
        raise Garbled("the server broke the completion off")
    if not isinstance(told, str) or told not in _FINISHES:
        raise RecordError(f"the server ended the completion for {excerpt(str(told))!r}")
    if not text and any(message.get(name) for name in _THOUGHTS):
        raise RecordError(
            "the server gave reasoning and no answer: start it without a reasoning parser, or "
            f"give more max_tokens than {request.sampling.max_tokens}"
        )
    return Completion(text, tokens, "length" if _FINISHES[told] == "length" else "stop")
