"""Random charts and lessons, laid out in batches for the pretraining of the embedded model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from insightv.demo import tiny
from insightv.demo.charts import LARGEST, SIZE, Chart, draw, make_chart, mark_of_patch
from insightv.demo.lessons import (
    Lesson,
    mixed_lessons,
    reasoning_lessons,
    retrieval_lessons,
    scoring_lesson,
    shape_lessons,
    shape_scoring_lesson,
    thinking_lessons,
)
from insightv.demo.practice import Sampled
from insightv.demo.shapes import training_pictures
from insightv.demo.tables import tables, vocabulary

PREFIX = tiny.TOKENS + 2
"""``<s><user>`` and the picture tokens."""


@dataclass(frozen=True)
class Shape:
    """How a batch is laid out: pictures, and text tokens behind each picture."""

    pictures: int
    text: int


SEEING = Shape(96, 0)
READING = Shape(48, 128)
REASONING = Shape(32, 240)
SCORING = Shape(16, 384)
THINKING = Shape(40, 300)
"""Rows without a picture."""
SHAPES = {"seeing": SEEING, "reasoning": REASONING, "scoring": SCORING, "thinking": THINKING}


@dataclass
class Batch:
    """One batch; ``pictures`` rows of ``PREFIX + text`` tokens (``2 + text`` without pixels)."""

    pixels: torch.Tensor | None
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    tags: torch.Tensor
    patch_labels: torch.Tensor
    patch_values: torch.Tensor


def random_chart(rng: random.Random) -> Chart:
    """A chart of random values under labels as they occur together in real tables."""
    count = rng.randint(3, 6)
    if rng.random() < 0.7:
        labels = rng.choice(tables()).labels
        if len(labels) < count:
            labels = tuple(vocabulary())
        if rng.random() < 0.6:
            first = rng.randrange(len(labels) - count + 1)
            chosen = labels[first : first + count]
        else:
            chosen = tuple(rng.sample(labels, count))
    else:
        chosen = tuple(rng.sample(vocabulary(), count))
    top = rng.choice((8, 15, 20, 30, LARGEST, LARGEST))
    values = [rng.randint(1, top) for _ in chosen]
    if rng.random() < 0.3:
        values.sort(reverse=rng.random() < 0.5)
    elif rng.random() < 0.3:  # a slowly changing series
        values = [rng.randint(3, LARGEST - 3)]
        while len(values) < count:
            values.append(min(LARGEST, max(1, values[-1] + rng.randint(-5, 5))))
    return make_chart(rng, chosen, tuple(values))


def build_vocabulary() -> set[str]:
    """Every word of the lessons, the labels and the questions of easy-vqa."""
    rng, texts = random.Random(1), []
    for _ in range(3000):
        chart = random_chart(rng)
        lessons = [*mixed_lessons(chart, rng), scoring_lesson(chart, rng)]
        texts += [turn for lesson in lessons for turn in lesson.turns]
    for _, pairs in training_pictures():
        texts += [text for pair in pairs for text in pair]
    words = tiny.words_of(texts) | set(vocabulary()) | {f"[{k}]" for k in range(1, 10)}
    return words | {"(A)", "(B)", "(C)", "(D)", "none", "unclear"}


class Teacher:
    """Turns charts and lessons into batches."""

    def __init__(self, tokenizer: Any, seed: int):
        """Takes the model's tokenizer and the seed of every choice."""
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.shapes = training_pictures()
        self.sampled: list[Sampled] = []
        token = tokenizer.convert_tokens_to_ids
        self.user, self.assistant, self.end = token("<user>"), token("<assistant>"), token("</s>")
        self.image, self.start = token("<image>"), token("<s>")
        self.title, self.read = token(tiny.FRAMES[0]), token("▁Read")
        self.closing = {token(tiny.FRAMES[2]), token(tiny.FRAMES[3])}
        self.label_ids = [token("▁" + label) for label in vocabulary()]
        self.number_ids = [token(f"▁{value}") for value in range(LARGEST + 1)]
        self._label_of = {label: k for k, label in enumerate(vocabulary())}
        self._label_by_id = dict(zip(self.label_ids, vocabulary(), strict=True))
        self._number_by_id = {token(f"▁{value}"): value for value in range(101)}
        self._readable = {*self._label_by_id, *self._number_by_id}
        self.equals = token("▁=")

    def batch(self, kind: str) -> Batch:
        """A batch of ``seeing`` (no text), ``mixed``, ``retrieval``, … lessons."""
        shape = SHAPES.get(kind, READING)
        charts: list[Chart | None] = []
        images, lessons = [], []
        if kind == "thinking":
            tables = [random_chart(self.rng).table for _ in range(shape.pictures)]
            return self._collate([], [], [thinking_lessons(t, self.rng) for t in tables], shape)
        for _ in range(shape.pictures):
            if kind != "seeing" and self.rng.random() < 0.15:
                image, pairs = self.rng.choice(self.shapes)
                charts.append(None)
                images.append(image)
                scoring = [shape_scoring_lesson(pairs, self.rng) for _ in range(2)]
                lessons.append(scoring if kind == "scoring" else shape_lessons(pairs, self.rng))
                continue
            chart, chosen = self._chart_lessons(kind)
            charts.append(chart)
            images.append(draw(chart))
            lessons.append(chosen)
        return self._collate(charts, images, lessons, shape)

    def _chart_lessons(self, kind: str) -> tuple[Chart, list[Lesson]]:
        if kind == "seeing":
            return random_chart(self.rng), []
        if kind == "mixed":
            chart = random_chart(self.rng)
            return chart, mixed_lessons(chart, self.rng)
        if kind == "retrieval":
            chart = random_chart(self.rng)
            return chart, retrieval_lessons(chart, self.rng)
        if kind == "reasoning":
            chart = random_chart(self.rng)
            return chart, reasoning_lessons(chart, self.rng)
        if self.sampled and self.rng.random() < 0.6:
            own = self.rng.choice(self.sampled)
            return own.chart, [scoring_lesson(own.chart, self.rng, (own.question, own.paths))]
        chart = random_chart(self.rng)
        return chart, [scoring_lesson(chart, self.rng) for _ in range(2)]

    def _collate(
        self,
        charts: list[Chart | None],
        images: list,
        lessons: list[list[Lesson]],
        shape: Shape,
    ) -> Batch:
        prefix = [self.start, self.user] + [self.image] * (tiny.TOKENS if images else 0)
        rows, length = shape.pictures, len(prefix) + shape.text
        ids = np.zeros((rows, length), np.int64)
        segment = np.full((rows, length), -1, np.int64)
        positions = np.zeros((rows, length), np.int64)
        labels = np.full((rows, length), -100, np.int64)
        tags = np.full((rows, length), -100, np.int64)
        ids[:, : len(prefix)], segment[:, : len(prefix)] = prefix, 0
        positions[:, : len(prefix)] = np.arange(len(prefix))
        turns = [turn for row in lessons for lesson in row for turn in lesson.turns]
        encoded = iter(self.tokenizer(turns or [""], add_special_tokens=False)["input_ids"])
        for row, chosen in enumerate(lessons):
            offset = len(prefix)
            for number, lesson in enumerate(chosen, 1):
                text, target = self._chat([next(encoded) for _ in lesson.turns])
                size = len(text)
                if offset + size > length:
                    continue
                here = slice(offset, offset + size)
                ids[row, here], segment[row, here] = text, number
                positions[row, here] = np.arange(PREFIX, PREFIX + size)
                if lesson.learned == "work":
                    target = self._work(text, target)
                elif lesson.learned == "results":
                    target = self._results(text, target)
                labels[row, here] = np.where(target, text, -100)
                if lesson.scoring:
                    for k, stated, true in self._readings(text, target, charts[row]):
                        tags[row, offset + k] = int(stated == true)
                        labels[row, offset + k] = self.number_ids[true]
                offset += size
        seg = torch.from_numpy(segment)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = ((seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])) & causal
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -1e4)
        patch_labels, patch_values = self._patches(charts)
        pixels = None
        if images:
            stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
            pixels = stacked.permute(0, 3, 1, 2).float() / 127.5 - 1
        return Batch(
            pixels=pixels,
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            mask=mask[:, None],
            labels=torch.from_numpy(labels),
            tags=torch.from_numpy(tags),
            patch_labels=patch_labels,
            patch_values=patch_values,
        )

    def _chat(self, turns: list[list[int]]) -> tuple[list[int], list[bool]]:
        """Token ids of a chat behind the picture, and which of them are learned."""
        text: list[int] = []
        target: list[bool] = []
        for number, turn in enumerate(turns):
            reply = number % 2 == 1
            lead = [self.assistant] if reply else ([self.user] if number else [])
            tail = [self.end] if reply else []
            text += lead + turn + tail
            target += [False] * len(lead) + [reply] * (len(turn) + len(tail))
        return text, target

    def _work(self, text: list[int], target: list[bool]) -> list[bool]:
        """Targets that can be known without the picture: all but what is read from it.

        Of the steps that read, the labels the question asks for can be known, nothing else.
        """
        asked = {t for t, reply in zip(text, target, strict=True) if not reply}
        asked &= self._label_by_id.keys()
        known, reading = list(target), False
        for k in range(1, len(text)):
            if text[k - 1] == self.title:
                reading = text[k] == self.read
            elif text[k] in self.closing:
                reading = False
            elif reading and text[k - 1] != self.read and text[k] in self._readable:
                known[k] = target[k] and text[k] in asked
        return known

    def _results(self, text: list[int], target: list[bool]) -> list[bool]:
        """Targets behind an equals sign, up to the end of the step."""
        known, behind = [], False
        for token, reply in zip(text, target, strict=True):
            behind = behind and token not in self.closing
            known.append(reply and behind)
            behind |= token == self.equals
        return known

    def _readings(
        self, text: list[int], target: list[bool], chart: Chart | None
    ) -> Iterator[tuple[int, int, int]]:
        """Where a prompt's paths state values: place, the value stated, the true value."""
        table, reading = chart.table if chart else {}, False
        for k in range(1, len(text)):
            if target[k]:
                break
            if text[k - 1] == self.title:
                reading = text[k] == self.read
            elif text[k] in self.closing:
                reading = False
            elif reading and text[k] in self._number_by_id:
                label = self._label_by_id.get(text[k - 1])
                if label in table:
                    yield k, self._number_by_id[text[k]], table[label]

    def _patches(self, charts: list[Chart | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """The label and the value each picture token should carry (-100: none)."""
        side = SIZE // tiny.PATCH
        labels = np.full((len(charts), side * side), -100, np.int64)
        values = labels.copy()
        for row, chart in enumerate(charts):
            if chart is None:
                continue
            marks = np.array(mark_of_patch(chart, side)).reshape(-1)
            inside = marks >= 0
            names = np.array([self._label_of[label] for label in chart.labels])
            labels[row, inside] = names[marks[inside]]
            values[row, inside] = np.array(chart.values)[marks[inside]]
        return torch.from_numpy(labels), torch.from_numpy(values)
