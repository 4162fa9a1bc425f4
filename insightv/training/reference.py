"""Reference log-probabilities as a map stage, so that a trainer holds one model only."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from hpc.stages import Row
from insightv import models
from insightv.pictures import Pictures
from insightv.training.batches import Encoder, Example, TooLong
from insightv.training.config import ReferenceConfig
from insightv.training.objectives import segment_sums
from insightv.training.packing import Packer
from insightv.training.policy import LogProbs

Values = tuple[float, float]
"""Of the chosen and of the rejected reply of a pair."""


class Reference:
    """`PreferencePair` rows in, the same rows with their reference values out.

    Pairs of many questions share a batch: calls put their pairs into one queue, and whatever
    has gathered there by the time the model is free goes through it together.
    """

    def __init__(self, model: Path, config: ReferenceConfig, pictures: Pictures):
        """Loads the reference model.

        Raises:
            UserError: The folder is no model, or a value of ``config`` is out of its range.
        """
        config.validate()
        self.concurrency = config.concurrency
        loaded = models.load(model, device=config.device, dtype="float32")
        self._device, self.digest = str(loaded.model.device), loaded.digest
        self._logps = LogProbs(loaded.model, config.precision)
        self._packer = Packer(loaded.model, loaded.tokenizer.pad_token_id, config.tokens_per_batch)
        self._encoder = Encoder(
            loaded.processor, pictures, config.max_length, config.picture_cache_mb
        )
        self._share = config.share_pictures
        self._waiting: list[tuple[list[Example], asyncio.Future[list[Values]]]] = []
        self._thread = ThreadPoolExecutor(1)
        self._drain: asyncio.Task[None] | None = None

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        """Fills in ``reference_chosen``, ``reference_rejected`` and ``reference_model``.

        A pair longer than ``max_length`` is passed on as it came; training drops and counts it.

        Raises:
            RecordError: A picture of the question is broken, or a chat cannot be told.
        """
        loop = asyncio.get_running_loop()
        rows = inputs["pairs"]
        examples = await loop.run_in_executor(self._thread, self._encode, rows)
        known = [example for example in examples if example is not None]
        values: Iterator[Values] = iter(())
        if known:
            answer: asyncio.Future[list[Values]] = loop.create_future()
            self._waiting.append((known, answer))
            if self._drain is None or self._drain.done():
                self._drain = asyncio.create_task(self._work())
            values = iter(await answer)
        return [
            row if example is None else self._filled(row, next(values))
            for row, example in zip(rows, examples, strict=True)
        ]

    async def close(self) -> None:
        """Ends the thread; calls still waiting are cancelled."""
        if self._drain is not None:
            self._drain.cancel()
        for _, answer in self._waiting:
            answer.cancel()
        self._waiting.clear()
        self._thread.shutdown(wait=True)

    def _filled(self, row: Row, values: Values) -> Row:
        return {
            **row,
            "reference_chosen": values[0],
            "reference_rejected": values[1],
            "reference_model": self.digest,
        }

    def _encode(self, rows: Sequence[Row]) -> list[Example | None]:
        examples: list[Example | None] = []
        for row in rows:
            try:
                examples.append(self._encoder.pair(row))
            except TooLong:
                examples.append(None)
        return examples

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            taken, self._waiting = self._waiting, []
            try:
                values = await loop.run_in_executor(
                    self._thread, self._score, [examples for examples, _ in taken]
                )
            except Exception as error:  # every waiting call must hear of it
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), value in zip(taken, values, strict=True):
                if not future.done():
                    future.set_result(value)

    @torch.no_grad()
    def _score(self, calls: Sequence[Sequence[Example]]) -> list[list[Values]]:
        """Summed log-probabilities of (chosen, rejected), in the order of each call's pairs."""
        # Keys of pairs need not be unique across questions in flight; places are.
        places = itertools.count()
        marked = [[replace(one, key=f"{next(places):09d}") for one in call] for call in calls]
        laid = self._packer.trees if self._share else lambda pairs: map(self._packer.tree, pairs)
        values: dict[int, Values] = {}
        for batch in self._packer.packed([tree for call in marked for tree in laid(call)]):
            batch = batch.to(self._device)
            sums = segment_sums(self._logps(batch), batch.owners, batch.replies).tolist()
            for number, key in enumerate(batch.keys):
                values[int(key)] = (sums[2 * number], sums[2 * number + 1])
        return [[values[int(one.key)] for one in call] for call in marked]
