"""The engine in process: transformers models on batches that form by themselves."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc.errors import RecordError
from insightv import chats, models
from insightv.engines.base import Completion, Request
from insightv.engines.caching import Cache
from insightv.engines.config import EngineConfig
from insightv.engines.decoding import Call, Decoder
from insightv.engines.rows import decode
from insightv.pictures import Pictures

_TICK = 0.003
"""A batch starts after this many seconds without a new request. Paths that were just answered
come back with their next step well within it."""
_TURNS = 10
"""And after so many turns of the event loop, if it is slower than that."""
_ENOUGH = 4
"""More than this many batches of requests are not waited for."""
_REMEMBERED = 2
"""Tokens that are remembered between batches, in tokens of a full batch: one batch runs while as
many calls wait. They count towards ``batch_tokens``."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job(Call):
    """A request on its way: when it came, and the future of its reply."""

    number: int
    reply: asyncio.Future[Completion]

    @property
    def prompt(self) -> int:
        return len(self.encoding.ids)


class TransformersEngine:
    """Completes chats with a model folder (see ``insightv.engines.base.Engine``).

    Requests wait until none has come for a moment, then the oldest runs with those closest to
    it in length, in a thread of its own.
    """

    def __init__(self, model_folder: str | Path, config: EngineConfig, pictures: Pictures):
        """Loads the model.

        Raises:
            UserError: The folder or the configuration is wrong.
        """
        config.validate()
        loaded = models.load(model_folder, config.device, config.dtype)
        self.digest = loaded.digest
        # As many run as wait to take the places of those that are done.
        self.concurrency = 2 * config.batch_size
        self.context = config.context or models.longest_input(loaded.model)
        self._model: Any = loaded.model
        self._processor = loaded.processor
        self._tokenizer = loaded.tokenizer
        self._autocast = config.autocast
        self._ends = _ends(loaded)
        self._rows = config.batch_size
        self._budget = config.batch_tokens
        self._pictures = pictures
        self._decoder: Decoder[_Job] = Decoder(loaded.model, loaded.tokenizer, self._ends)
        self._cache = Cache(
            self._encode_picture, lambda encoded: encoded.bytes, config.cache_mb * 2**20
        )
        self._pending: list[_Job] = []
        self._running: list[_Job] = []
        self._preparing = 0
        self._asked = 0
        self._runner: asyncio.Task[None] | None = None
        self._encoders = ThreadPoolExecutor(config.encoders, "encode")
        # The number of threads is the calling thread's own, so the worker sets it.
        threads = config.threads or torch.get_num_threads()
        self._worker = ThreadPoolExecutor(1, "model", torch.set_num_threads, (threads,))

    async def complete(self, request: Request) -> Completion:
        """Completes one chat, in a batch with others that are awaited at the same time."""
        loop = asyncio.get_running_loop()
        self._preparing += 1
        self._asked += 1
        number = self._asked
        try:
            encoding = await loop.run_in_executor(self._encoders, self._encode, request)
        finally:
            self._preparing -= 1
        room = self.context - len(encoding.ids)
        if room < 1:
            raise RecordError(f"prompt of {len(encoding.ids)} tokens, context of {self.context}")
        limit = min(request.sampling.max_tokens, room)
        job = _Job(request, encoding, limit, number, loop.create_future())
        self._pending.append(job)
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        return await job.reply

    def count(self, request: Request) -> int:
        """Length of the request's prompt in tokens, pictures included."""
        return len(self._encode(request).ids)

    async def close(self) -> None:
        """Lets the model's turn end, refuses what waits, frees the model."""
        if self._runner is not None:
            self._runner.cancel()
        for job in self._pending + self._running:
            job.reply.cancel()
        self._pending.clear()
        await asyncio.to_thread(self._worker.shutdown)
        await asyncio.to_thread(self._encoders.shutdown)
        self._model = None
        del self._decoder
        _free()

    def _encode(self, request: Request) -> chats.Encoding:
        encoded = [self._cache.get(picture) for picture in request.pictures]
        return chats.encode(self._processor, request.messages, encoded)

    def _encode_picture(self, picture: str) -> chats.EncodedPicture:
        return chats.encode_picture(self._processor, self._pictures.image(picture))

    async def _run(self) -> None:
        """Runs what waits until nothing does and nobody comes back."""
        loop = asyncio.get_running_loop()
        while True:
            await self._gather()
            jobs = self._take()
            self._running += jobs
            if not self._running:
                self._decoder.clear()  # others may need the memory
                return
            try:
                replies = await loop.run_in_executor(self._worker, self._advance, jobs)
            except BaseException as error:
                for job in self._running:
                    if not job.reply.done():
                        job.reply.set_exception(error)
                self._running = []
                if not isinstance(error, Exception):
                    raise
                continue
            for job, reply in replies:
                self._running.remove(job)
                if job.reply.done():  # its caller gave up
                    continue
                if isinstance(reply, RecordError):
                    job.reply.set_exception(reply)
                else:
                    job.reply.set_result(reply)

    async def _gather(self) -> None:
        """Waits while more requests are coming, within reason: who comes first is chance.

        So a batch is made of the same requests whatever the time they took, as long as their
        callers wait for nothing but this engine.
        """
        while len(self._pending) < _ENOUGH * self._rows:
            asked = self._asked
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            await asyncio.sleep(_TICK)
            if self._asked == asked and not self._preparing:
                return

    def _take(self) -> list[_Job]:
        """The oldest request and those nearest to it in length, where rows and tokens are free."""
        self._pending = [job for job in self._pending if not job.reply.done()]
        self._pending.sort(key=lambda job: job.number)
        if not self._pending or not self._decoder.open:
            return []
        oldest = self._pending[0]

        def distance(job: _Job) -> int:
            return abs(job.prompt - oldest.prompt) + abs(job.limit - oldest.limit)

        count, taken = len(self._running), []
        prompt, limit = _lengths(self._running)
        for job in [oldest, *sorted(self._pending[1:], key=distance)]:
            prompt, limit = max(prompt, job.prompt), max(limit, job.limit)
            too_long = count and (count + 1) * (prompt + limit) > self._budget
            if too_long or count == self._rows:
                break
            taken.append(job)
            count += 1
        gone = set(taken)
        self._pending = [job for job in self._pending if job not in gone]
        return taken

    def _advance(self, jobs: list[_Job]) -> list[tuple[_Job, Completion | RecordError]]:
        """The model's turn: until some rows are done."""
        running = self._running
        longest = sum(_lengths(running))
        room = min(self._budget - len(running) * longest, _REMEMBERED * self._rows * longest)
        self._decoder.prefixes.limit(room)
        try:
            with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._autocast):
                ended = self._decoder.run(jobs)
            return [(job, self._completion(job, ids)) for job, ids in ended]
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                self._decoder.clear()
                raise
        # Outside the handler, whose traceback would keep the tensors alive.
        self._decoder.clear()
        _free()
        if len(running) == 1:
            return [(running[0], RecordError(f"out of memory with one row of {longest} tokens"))]
        self._budget = max(1, min(self._budget, len(running) * longest // 2))
        log.warning("out of memory; batches of %d tokens from now on", self._budget)
        self._pending += running  # all begin again
        self._running = []
        return []

    def _completion(self, job: _Job, ids: list[int]) -> Completion:
        """The text of a row's new tokens, cut before its first stop string."""
        ended = bool(ids) and ids[-1] in self._ends
        # Decoders that drop a leading space must see what stands before.
        before = job.encoding.ids[-4:]
        prefix = decode(self._tokenizer, before)
        text = decode(self._tokenizer, before + ids)
        text = text[len(prefix) :] if text.startswith(prefix) else decode(self._tokenizer, ids)
        found = [place for stop in job.request.stop if stop and (place := text.find(stop)) >= 0]
        if found:
            text = text[: min(found)]
        return Completion(text, len(ids), "stop" if ended or found else "length")


def _lengths(jobs: list[_Job]) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest reply there may be."""
    return max((job.prompt for job in jobs), default=0), max((job.limit for job in jobs), default=0)


def _ends(loaded: models.LoadedModel) -> list[int]:
    """The tokens that end a turn, as the folder and the tokenizer tell them."""
    told = loaded.model.generation_config.eos_token_id
    told = told if isinstance(told, Sequence) else [told]
    return sorted({end for end in [*told, loaded.tokenizer.eos_token_id] if end is not None})


def _out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory, on a GPU or (where torch has no type for it) a CPU."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(word in str(error).lower() for word in words)


def _free() -> None:
    """Gives a GPU's memory back; a CPU's goes back by itself."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
