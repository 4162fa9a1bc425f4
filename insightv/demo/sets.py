"""The demo's three question sets: charts (reasoning), reading and shapes (perception).

``charts`` and ``reading`` ask about pictures drawn from the real tables of ``tables.py``;
``shapes`` are the pictures and questions of the easy-VQA package. Splits are fixed before
anything is drawn: by group of tables for charts, by picture for shapes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from hpc.errors import UserError
from insightv.demo import charts
from insightv.demo.asking import TASKS, Ask, ask, ask_table, ask_value
from insightv.demo.series import MONTHS, QUARTERS, WEEKDAYS, YEARS
from insightv.demo.shapes import easy_vqa_rows, picture_split
from insightv.demo.tables import Table, split_of, tables
from insightv.records import AnswerType, Question, seed_for

SPLITS = ("train", "validation", "test")
_PATIENCE = 20_000  # draws in a row that may fail before a set is called exhausted
_ORDERED = {*MONTHS, *QUARTERS, *map(str, YEARS), *WEEKDAYS}
_ORDERED |= {f"{decade}s" for decade in range(20, 80, 10)}


class PictureSink(Protocol):
    """Takes encoded pictures; a ``PictureWriter`` is one."""

    def add(self, data: bytes) -> str:
        """Stores a picture and returns its id."""
        ...


@dataclass
class Sizes:
    """How many questions each split of a set has."""

    train: int = 0
    validation: int = 0
    test: int = 0


@dataclass
class QuestionsConfig:
    """What is asked.

    Attributes:
        charts: Reasoning about charts; 1,000 test questions give intervals of about ±3 points.
        reading: Perception: transcribe a chart, read one value.
        shapes: Perception: easy-VQA.
        tasks: Tasks of ``charts``, asked equally often; empty means all of them.
        kinds: Kinds of chart to draw; empty means all of them.
        held_out_seed: Draws validation and test, whatever the seed of the run: runs with
            different seeds are compared on the same questions.
    """

    charts: Sizes = field(default_factory=lambda: Sizes(600, 150, 1000))
    reading: Sizes = field(default_factory=lambda: Sizes(100, 50, 300))
    shapes: Sizes = field(default_factory=lambda: Sizes(100, 50, 300))
    tasks: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    held_out_seed: int = 1

    def validate(self) -> None:
        """Checks names and sizes.

        Raises:
            UserError: A task or kind does not exist, or a size is negative.
        """
        for what, given, known in (
            ("task", self.tasks, tuple(TASKS)),
            ("kind of chart", self.kinds, charts.KINDS),
        ):
            for name in given:
                if name not in known:
                    raise UserError(f"questions: no {what} {name!r}; use {', '.join(known)}")
        for name in ("charts", "reading", "shapes"):
            for split in SPLITS:
                if (size := getattr(getattr(self, name), split)) < 0:
                    raise UserError(f"questions.{name}.{split} is {size}; give 0 or more")


def make_questions(
    split: str, config: QuestionsConfig, seed: int, pictures: PictureSink
) -> Iterator[Question]:
    """All questions of one split, set after set; their pictures go to ``pictures``.

    Args:
        split: ``train``, ``validation`` or ``test``.
        config: Sizes and choices.
        seed: The run's seed; draws ``train`` (the others have their own).
        pictures: Where the pictures are stored.

    Raises:
        UserError: No such split, a wrong choice in ``config``, a package that is not
            installed, or more questions than the data can give.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; use {', '.join(SPLITS)}")
    config.validate()
    seed = seed if split == "train" else config.held_out_seed
    for name, make in (("charts", _charts), ("reading", _reading), ("shapes", _shapes)):
        size = getattr(getattr(config, name), split)
        if size:
            rng = random.Random(seed_for(seed, "questions", name, split))
            yield from make(split, size, config, rng, pictures)


def digest(split: str, config: QuestionsConfig | None = None, seed: int = 0) -> str:
    """SHA-256 over the canonical JSON of a split's questions, picture ids included.

    The ids hash PNG files, so the digest holds for one version of Pillow.
    """
    sha = hashlib.sha256()
    for question in make_questions(split, config or QuestionsConfig(), seed, _Ids()):
        row = json.dumps(question.to_json(), sort_keys=True, ensure_ascii=False)
        sha.update(f"{row}\n".encode())
    return sha.hexdigest()


class _Ids:
    """Names pictures as a ``PictureWriter`` does, and keeps none."""

    def add(self, data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()


# Charts.


def _charts(
    split: str, size: int, config: QuestionsConfig, rng: random.Random, pictures: PictureSink
) -> Iterator[Question]:
    tasks = config.tasks or list(TASKS)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    plots = _plots(split, config, rng)
    for n in range(size):
        task = tasks[n % len(tasks)]
        for _ in range(_PATIENCE):
            group, chart = next(plots)
            question = ask(chart.table, rng, task)
            if question is not None and _balanced(question, answers[task]):
                break
        else:
            raise UserError(f"questions: no chart of the {split} split allows another {task!r}")
        answers[task][question.answer] += 1
        yield _about(f"charts:{split}:{n}", question, group, chart, pictures)


def _reading(
    split: str, size: int, config: QuestionsConfig, rng: random.Random, pictures: PictureSink
) -> Iterator[Question]:
    plots = _plots(split, config, rng)
    for n in range(size):
        group, chart = next(plots)
        question = (
            ask_value(chart.table, rng.choice(chart.labels)) if n % 2 else ask_table(chart.table)
        )
        yield _about(f"reading:{split}:{n}", question, group, chart, pictures)


def _about(
    key: str, question: Ask, group: str, chart: charts.Chart, pictures: PictureSink
) -> Question:
    picture = pictures.add(charts.encode_png(charts.draw(chart)))
    return Question(
        key=key,
        text=question.text,
        pictures=(picture,),
        answer=question.answer,
        answer_type=question.answer_type,
        options=question.options,
        task=question.task,
        group=group,
    )


def _balanced(question: Ask, seen: Counter[str]) -> bool:
    """Whether a closed question's answer is not yet ahead: guessing one must not pay."""
    if question.answer_type == "yes_no":
        closed = ["yes", "no"]
    elif question.answer_type == "choice":
        closed = [chr(ord("A") + k) for k in range(len(question.options))]
    else:
        return True
    return seen[question.answer] <= min(seen[answer] for answer in closed)


def _plots(
    split: str, config: QuestionsConfig, rng: random.Random
) -> Iterator[tuple[str, charts.Chart]]:
    """Endless charts of a split's tables, each with its group; no two say the same.

    Raises:
        UserError: The tables give no further chart.
    """
    groups = _groups(split)
    names = list(groups)
    # Large groups hold more questions, but not in proportion: the test resamples groups.
    weights = [len(groups[name]) ** 0.5 for name in names]
    kinds = tuple(config.kinds) or charts.KINDS
    drawn: set[tuple[tuple[str, int], ...]] = set()
    failed = 0
    while failed < _PATIENCE:
        (name,) = rng.choices(names, weights)
        marks = _marks(rng.choice(groups[name]), rng)
        # Charts of almost one value ask for nothing.
        flat = len({value for _, value in marks}) < 3
        if flat or marks in drawn or _elsewhere(marks, split):
            failed += 1
            continue
        failed = 0
        drawn.add(marks)
        labels, values = zip(*marks, strict=True)
        yield name, charts.make_chart(rng, labels, values, kinds)
    raise UserError(
        f"questions: the tables of the {split} split give no more than {len(drawn)} charts; "
        "ask for fewer"
    )


def _marks(table: Table, rng: random.Random) -> tuple[tuple[str, int], ...]:
    """Three to six of a table's marks, neighbours or chosen, in an order that makes sense."""
    marks = list(zip(table.labels, table.values, strict=True))
    count = rng.randint(3, min(6, len(marks)))
    if rng.random() < 0.5:
        start = rng.randint(0, len(marks) - count)
        marks = marks[start : start + count]
    else:
        marks = [marks[k] for k in sorted(rng.sample(range(len(marks)), count))]
    if not all(label in _ORDERED for label, _ in marks):
        rng.shuffle(marks)
    return tuple(marks)


@lru_cache
def _groups(split: str) -> dict[str, list[Table]]:
    groups: dict[str, list[Table]] = {}
    for table in tables():
        if split_of(table.group) == split:
            groups.setdefault(table.group, []).append(table)
    return groups


@lru_cache
def _holders() -> dict[tuple[str, int], dict[str, frozenset[str]]]:
    """For each mark, in each split: the names of the tables that hold it."""
    holders: dict[tuple[str, int], dict[str, set[str]]] = {}
    for table in tables():
        for mark in zip(table.labels, table.values, strict=True):
            by_split = holders.setdefault(mark, {split: set() for split in SPLITS})
            by_split[split_of(table.group)].add(table.name)
    return {m: {s: frozenset(n) for s, n in splits.items()} for m, splits in holders.items()}


def _elsewhere(marks: tuple[tuple[str, int], ...], split: str) -> bool:
    """Whether a table of another split happens to hold all of these marks."""
    holders = [_holders()[mark] for mark in marks]
    others = [other for other in SPLITS if other != split]
    return any(frozenset.intersection(*(h[other] for h in holders)) for other in others)


# Shapes.


def _shapes(
    split: str, size: int, config: QuestionsConfig, rng: random.Random, pictures: PictureSink
) -> Iterator[Question]:
    """easy-VQA's own pictures and questions, half of them yes-no, one a picture."""
    asked = _asked_shapes()
    chosen = [path for path in asked if picture_split(path) == split]
    # Not by folder: where the package is installed must not matter.
    chosen.sort(key=lambda path: int(path.stem))
    rng.shuffle(chosen)
    if size > len(chosen):
        raise UserError(
            f"questions.shapes.{split} is {size}, but easy-VQA has {len(chosen)} pictures for it"
        )
    kinds: Counter[AnswerType] = Counter()
    for n, path in enumerate(chosen[:size]):
        questions = asked[path]
        wanted = "yes_no" if kinds["yes_no"] <= kinds["label"] else "label"
        fitting = [q for q in questions if (q[1] in ("yes", "no")) == (wanted == "yes_no")]
        text, answer = rng.choice(fitting or questions)
        closed = answer in ("yes", "no")
        kinds["yes_no" if closed else "label"] += 1
        yield Question(
            key=f"shapes:{split}:{n}",
            text=text,
            pictures=(pictures.add(path.read_bytes()),),
            answer=answer,
            answer_type="yes_no" if closed else "label",
            task="presence" if closed else "color" if "color" in text else "shape",
            group=f"shapes/{'test' if split == 'test' else 'train'}/{path.stem}",
        )


@lru_cache
def _asked_shapes() -> dict[Path, list[tuple[str, str]]]:
    """Every picture file of easy-VQA with its (question, answer) pairs."""
    asked: dict[Path, list[tuple[str, str]]] = {}
    for text, answer, path in [*easy_vqa_rows("train"), *easy_vqa_rows("test")]:
        asked.setdefault(path, []).append((text, answer))
    return asked
