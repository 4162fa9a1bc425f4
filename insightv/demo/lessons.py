"""What the embedded model is taught about one picture: prompts with their replies.

Prompts and replies go through the same functions the method uses at run time
(``Prompts.render``, ``render_steps``, ``render_paths``, ``render_scores``), so that the
model meets no text it has not been taught to read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from insightv.assessment.scoring import render_paths, render_scores
from insightv.demo.asking import (
    TASKS,
    Ask,
    Table,
    ask,
    ask_table,
    ask_value,
    solve,
    worked_steps,
)
from insightv.demo.charts import Chart
from insightv.demo.checking import corrupted_steps, mark, misread
from insightv.prompting import load_prompts
from insightv.records import Step
from insightv.steps import render_steps

PROMPTS = load_prompts("tiny")


@dataclass(frozen=True)
class Lesson:
    """A chat about the picture: turns alternate user, assistant; replies are learned.

    Attributes:
        turns: Texts, the user's first.
        scoring: Whether the prompt holds paths whose readings can be tagged right or wrong.
    """

    turns: tuple[str, ...]
    scoring: bool = False


def draw_question(table: Table, rng: random.Random) -> Ask:
    """A reasoning question of a random task that the table allows."""
    while True:
        question = ask(table, rng, rng.choice(list(TASKS)))
        if question is not None:
            return question


def mixed_lessons(chart: Chart, rng: random.Random) -> list[Lesson]:
    """Transcribing, values, direct answers, one path, and one of the rarer skills."""
    table = chart.table
    lessons = [_table(table)]
    lessons += [_value(table, label) for label in rng.sample(list(table), 2)]
    lessons += [_direct(draw_question(table, rng)) for _ in range(2)]
    lessons.append(_steps(table, rng))
    rare = rng.random()
    if rare < 0.35:
        lessons.append(_summary(table, rng))
    elif rare < 0.55:
        lessons.append(_plain_summary(draw_question(table, rng)))
    elif rare < 0.7:
        lessons.append(_judge(table, rng))
    else:
        lessons.append(_steps(table, rng))
    return lessons


def retrieval_lessons(chart: Chart, rng: random.Random) -> list[Lesson]:
    """The value of every label, then two paths: retrieval by label is the bottleneck."""
    table = chart.table
    lessons = [_value(table, label) for label in rng.sample(list(table), len(table))]
    lessons += [_steps(table, rng), _direct(draw_question(table, rng))]
    rng.shuffle(lessons)
    return lessons


def reasoning_lessons(chart: Chart, rng: random.Random) -> list[Lesson]:
    """Several paths, one of the rarer skills, and a direct answer."""
    table = chart.table
    rare = rng.choice((_summary, _judge, _steps))
    return [
        *(_steps(table, rng) for _ in range(2)),
        rare(table, rng),
        _direct(draw_question(table, rng)),
        _table(table),
    ]


def scoring_lesson(
    chart: Chart, rng: random.Random, sampled: tuple[Ask, Sequence[Sequence[Step]]] | None = None
) -> Lesson:
    """One pass over several paths of a question, some of them spoilt.

    Args:
        chart: The chart.
        rng: Source of every choice.
        sampled: Paths that the model itself wrote, with their question; made up otherwise.
    """
    table = chart.table
    if sampled is None:
        question = draw_question(table, rng)
        makers = [rng.choice((worked_steps, corrupted_steps)) for _ in range(rng.randint(1, 4))]
        paths: list[Sequence[Step]] = [make(question, table, rng) for make in makers]
    else:
        question, paths = sampled[0], list(sampled[1])
        rng.shuffle(paths)
    marks = [mark(path, question, table) for path in paths]
    shown = render_paths([render_steps(path) for path in paths])
    prompt = PROMPTS.render("score", question=question.text, paths=shown, count=len(paths))
    return Lesson((prompt, render_scores(marks)), scoring=True)


def shape_lessons(pairs: Sequence[tuple[str, str]]) -> list[Lesson]:
    """Direct questions about a picture of a coloured shape, with and without the summary form."""
    roles = ("direct", "direct", "plain_summary")
    return [
        Lesson((PROMPTS.render(roles[k % 3], question=question), answer))
        for k, (question, answer) in enumerate(pairs)
    ]


def _table(table: Table) -> Lesson:
    return Lesson(
        (PROMPTS.render("direct", question=ask_table(table).text), ask_table(table).answer)
    )


def _value(table: Table, label: str) -> Lesson:
    return _direct(ask_value(table, label))


def _direct(question: Ask) -> Lesson:
    return Lesson((PROMPTS.render("direct", question=question.text), question.answer))


def _plain_summary(question: Ask) -> Lesson:
    return Lesson((PROMPTS.render("plain_summary", question=question.text), question.answer))


def _steps(table: Table, rng: random.Random) -> Lesson:
    """A right path, then the answer in a turn of its own."""
    question = draw_question(table, rng)
    steps = render_steps(worked_steps(question, table, rng))
    prompt = PROMPTS.render("reasoning", question=question.text)
    return Lesson((prompt, steps, PROMPTS.render("final"), question.answer))


def _summary(table: Table, rng: random.Random) -> Lesson:
    """The answer a given reasoning arrives at, be it right or wrong: trust comes later."""
    question = draw_question(table, rng)
    believed = misread(table, question.needed, rng) if rng.random() < 0.5 else table
    followed = solve(question, believed) or question
    steps = worked_steps(followed, believed if followed is not question else table, rng)
    prompt = PROMPTS.render("summary", question=question.text, reasoning=render_steps(steps))
    return Lesson((prompt, followed.answer))


def _judge(table: Table, rng: random.Random) -> Lesson:
    """Whether two answers mean the same."""
    question = draw_question(table, rng)
    other = solve(question, misread(table, question.needed, rng))
    given = other.answer if other is not None and rng.random() < 0.6 else question.answer
    prompt = PROMPTS.render("judge", question=question.text, truth=question.answer, answer=given)
    return Lesson((prompt, "yes" if given == question.answer else "no"))
