"""What `benchmarks/generation.py` holds our engine against: transformers' own ways to generate.

All work through the same paths: the calls of a path one after the other, each with the prompt
that stands in it. They are given what makes them fast where it does not change a text: pictures
resized once, steps that end at the token that closes them instead of at a stop string, prompts
of similar length side by side.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from insightv import chats
from insightv.engines import Completion, Request
from insightv.engines.rows import decode
from insightv.models import LoadedModel
from insightv.pictures import Pictures

Paths = Sequence[Sequence[Request]]
Replies = list[list[Completion]]
_PAGE = 32
"""Tokens of a page of the continuous batcher's cache, whose default is for GPUs."""


class Peers:
    """One loaded model, and the ways to run it over paths."""

    def __init__(self, loaded: LoadedModel, pictures: Pictures):
        """Takes the model and the pictures of the paths."""
        self.model: Any = loaded.model
        self.processor, self.tokenizer = loaded.processor, loaded.tokenizer
        self.pictures = pictures
        self.ends = [int(loaded.tokenizer.eos_token_id)]
        self._encoded: dict[str, chats.EncodedPicture] = {}
        texts = self.tokenizer.batch_decode([[n] for n in range(len(self.tokenizer))])
        self._braces = [number for number, text in enumerate(texts) if "}" in text]

    def forget(self) -> None:
        """Forgets the pictures: each run reads and resizes each of them once."""
        self._encoded.clear()

    def one_by_one(self, paths: Paths) -> Replies:
        """A `generate` for each call, its picture read anew: the authors' way."""
        return [[self._alone(call) for call in path] for path in paths]

    def static(self, paths: Paths, size: int) -> Replies:
        """Batches of `generate`: all first calls, then all second ones, by length of prompt."""
        replies: Replies = [[] for _ in paths]
        for depth in range(max(map(len, paths))):
            calls = {n: path[depth] for n, path in enumerate(paths) if len(path) > depth}
            encodings = {n: self._encode(call) for n, call in calls.items()}
            # A step and an answer end differently, and `generate` knows one way for a batch.
            for stop in {call.stop for call in calls.values()}:
                alike = [n for n, call in calls.items() if call.stop == stop]
                alike.sort(key=lambda n: len(encodings[n].ids))  # noqa: B023
                for start in range(0, len(alike), size):
                    batch = alike[start : start + size]
                    found = self._batch([calls[n] for n in batch], [encodings[n] for n in batch])
                    for number, reply in zip(batch, found, strict=True):
                        replies[number].append(reply)
        return replies

    def continuous(self, paths: Paths, size: int) -> tuple[Replies, float, float]:
        """transformers' continuous batching; also its seconds and processor seconds.

        A path's next call goes in when the one before is done. Making the cache is not
        counted, like loading the model.
        """
        encodings = [[self._encode(call).ids for call in path] for path in paths]
        longest = max(len(ids) + c.sampling.max_tokens for ids, c in _both(encodings, paths))
        pages = -(-longest // _PAGE) + 1
        config = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=(size + 1) * pages,
            max_batch_tokens=max(512, size),
            max_requests_per_batch=size,
        )
        settings = GenerationConfig(do_sample=False, eos_token_id=self.ends, max_new_tokens=1)
        replies: Replies = [[] for _ in paths]
        open_paths = len(paths)
        places: dict[str, int] = {}
        manager = self.model.init_continuous_batching(settings, config)

        def ask(number: int) -> None:
            call = paths[number][len(replies[number])]
            name = manager.add_request(
                encodings[number][len(replies[number])],
                max_new_tokens=call.sampling.max_tokens,
                eos_token_id=self._ending(call),
            )
            places[name] = number

        manager.warmup()
        manager.start()
        try:
            wall, cpu = time.perf_counter(), time.process_time()
            for number in range(len(paths)):
                ask(number)
            while open_paths:
                result = manager.get_result(timeout=60)
                if result is None or result.error is not None:
                    raise SystemExit(f"continuous batching failed: {result and result.error}")
                if not result.is_finished():
                    continue
                number = places.pop(result.request_id)
                done = replies[number]
                call = paths[number][len(done)]
                done.append(
                    self._reply(call, encodings[number][len(done)], result.generated_tokens)
                )
                if len(done) < len(paths[number]):
                    ask(number)
                else:
                    open_paths -= 1
            return replies, time.perf_counter() - wall, time.process_time() - cpu
        finally:
            manager.stop(block=True)
            manager.destroy()

    def _encode(self, call: Request) -> chats.Encoding:
        for name in call.pictures:
            if name not in self._encoded:
                image = self.pictures.image(name)
                self._encoded[name] = chats.encode_picture(self.processor, image)
        shown = [self._encoded[name] for name in call.pictures]
        return chats.encode(self.processor, call.messages, shown)

    def _alone(self, call: Request) -> Completion:
        text = chats.render(self.processor, call.messages, len(call.pictures))
        images = [self.pictures.image(name) for name in call.pictures]
        whole = text.startswith(self.tokenizer.bos_token)
        inputs = self.processor(
            images=images or None, text=[text], return_tensors="pt", add_special_tokens=not whole
        )
        stops = {"stop_strings": list(call.stop), "tokenizer": self.tokenizer} if call.stop else {}
        limit = call.sampling.max_tokens
        found = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False, **stops)
        ids = inputs["input_ids"][0].tolist()
        return self._reply(call, ids, found[0, len(ids) :].tolist())

    def _batch(self, calls: list[Request], encodings: list[chats.Encoding]) -> list[Completion]:
        inputs = chats.collate(encodings, self.tokenizer.pad_token_id)
        found = self.model.generate(
            **inputs,
            max_new_tokens=max(call.sampling.max_tokens for call in calls),
            do_sample=False,
            eos_token_id=self._ending(calls[0]),
        )
        new = found[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            self._reply(call, encoding.ids, ids)
            for call, encoding, ids in zip(calls, encodings, new, strict=True)
        ]

    def _ending(self, call: Request) -> list[int]:
        assert call.stop in ((), ("}",))
        return [*self.ends, *self._braces] if call.stop else self.ends

    def _reply(self, call: Request, prompt: list[int], ids: list[int]) -> Completion:
        """The completion as our engine tells it: up to the end, its limit, a stop string."""
        ending = self._ending(call)
        ids = ids[: call.sampling.max_tokens]
        length = next((n for n, token in enumerate(ids, 1) if token in ending), len(ids))
        ids, before = ids[:length], prompt[-4:]
        prefix, text = decode(self.tokenizer, before), decode(self.tokenizer, before + ids)
        text = text[len(prefix) :] if text.startswith(prefix) else decode(self.tokenizer, ids)
        stopped = bool(ids) and ids[-1] in ending
        found = [place for stop in call.stop if (place := text.find(stop)) >= 0]
        return Completion(
            text[: min(found)] if found else text, len(ids), "stop" if stopped else "length"
        )


def _both(encodings: list[list[list[int]]], paths: Paths) -> Iterable[tuple[list[int], Request]]:
    for path, calls in zip(encodings, paths, strict=True):
        yield from zip(path, calls, strict=True)
