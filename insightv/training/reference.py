"""Reference log-probabilities as a map stage, so that a trainer holds one model only."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        self._waiting: list[tuple[Example, asyncio.Future[tuple[float, float]]]] = []
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
        values = [None if example is None else loop.create_future() for example in examples]
        for example, value in zip(examples, values, strict=True):
            if example is not None and value is not None:
                self._waiting.append((example, value))
        if self._waiting and (self._drain is None or self._drain.done()):
            self._drain = asyncio.create_task(self._work())
        return [
            row if value is None else self._filled(row, await value)
            for row, value in zip(rows, values, strict=True)
        ]

    async def close(self) -> None:
        """Ends the thread; calls still waiting are cancelled."""
        if self._drain is not None:
            self._drain.cancel()
        for _, value in self._waiting:
            value.cancel()
        self._waiting.clear()
        self._thread.shutdown(wait=True)

    def _filled(self, row: Row, values: tuple[float, float]) -> Row:
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
                    self._thread, self._score, [example for example, _ in taken]
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
    def _score(self, examples: Sequence[Example]) -> list[tuple[float, float]]:
        """Summed log-probabilities of (chosen, rejected), in the order of ``examples``."""
        # Keys of pairs need not be unique across questions in flight; places are.
        marked = [
            Example(f"{place:09d}", example.replies) for place, example in enumerate(examples)
        ]
        values: dict[int, tuple[float, float]] = {}
        for batch in self._packer.batches(marked):
            batch = batch.to(self._device)
            sums = segment_sums(self._logps(batch), batch.owners, batch.replies).tolist()
            for number, key in enumerate(batch.keys):
                values[int(key)] = (sums[2 * number], sums[2 * number + 1])
        return [values[place] for place in range(len(examples))]
