"""What the embedded model is taught about one picture: prompts with their replies.

Prompts and replies go through the same functions the method uses at run time
(``Prompts.render``, ``render_steps``, ``render_paths``, ``render_scores``), so that the
model meets no text it has not been taught to read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from insightv.assessment.scoring import Marks, render_paths, render_scores
from insightv.demo.asking import (
    TASKS,
    Ask,
    Table,
    ask,
    ask_table,
    ask_value,
    ratio_text,
    solve,
    worked_steps,
)
from insightv.demo.charts import Chart
from insightv.demo.checking import corrupted_steps, mark, misread
from insightv.demo.shapes import COLOURS, FORMS, seen
from insightv.prompting import load_prompts
from insightv.records import Step
from insightv.steps import render_steps

PROMPTS = load_prompts("tiny")


HARDER = ("order", "change", "closest", "count_above", "top_two", "range")
"""Tasks whose line of work is the longest to learn: asked more often without a picture."""


@dataclass(frozen=True)
class Lesson:
    """A chat about the picture: turns alternate user, assistant; replies are learned.

    Attributes:
        turns: Texts, the user's first.
        scoring: Whether the prompt holds paths whose readings can be tagged right or wrong.
        learned: What of the replies can be known: ``all``; ``work``, what follows from the
            prompt and from the values read (there is no picture to read them from); or
            ``results``, only what stands behind an equals sign.
    """

    turns: tuple[str, ...]
    scoring: bool = False
    learned: Literal["all", "work", "results"] = "all"


def draw_question(table: Table, rng: random.Random, tasks: Sequence[str] = tuple(TASKS)) -> Ask:
    """A reasoning question of a random task that the table allows."""
    while True:
        question = ask(table, rng, rng.choice(tasks))
        if question is not None:
            return question


def draw_any(table: Table, rng: random.Random) -> Ask:
    """A reasoning question mostly; at times one of perception, which is reasoned about too."""
    kind = rng.random()
    if kind < 0.12:
        return ask_value(table, rng.choice(list(table)))
    return ask_table(table) if kind < 0.18 else draw_question(table, rng)


def mixed_lessons(chart: Chart, rng: random.Random) -> list[Lesson]:
    """Transcribing, values, direct answers, and a path or one of the rarer skills."""
    table = chart.table
    lessons = [_table(table)]
    lessons += [_value(table, label) for label in rng.sample(list(table), 2)]
    lessons.append(_direct(draw_question(table, rng)))
    rare = rng.choice((_steps, _steps, _summary, _judge, _plain_summary))
    lessons.append(rare(table, rng))
    return lessons


def retrieval_lessons(chart: Chart, rng: random.Random) -> list[Lesson]:
    """The value of every label, then a path: retrieval by label is the bottleneck."""
    table = chart.table
    lessons = [_steps(table, rng)]
    lessons += [_value(table, label) for label in rng.sample(list(table), len(table))]
    return lessons


def reasoning_lessons(chart: Chart, rng: random.Random) -> list[Lesson]:
    """Several paths, one of the rarer skills, and a direct answer."""
    table = chart.table
    rare = rng.choice((_summary, _plain_summary, _judge, _steps))
    return [
        *(_steps(table, rng) for _ in range(3)),
        rare(table, rng),
        _direct(draw_question(table, rng)),
        _table(table),
    ]


def thinking_lessons(table: Table, rng: random.Random) -> list[Lesson]:
    """Without a picture: how to work on what was read, what follows from given steps; and sums."""
    if rng.random() < 0.15:
        return [_drill(rng, 25)]
    lessons = []
    for _ in range(5):
        kind = rng.random()
        if kind < 0.15:
            lessons.append(_summary(table, rng, ask_table(table)))
        elif kind < 0.3:
            lessons.append(_summary(table, rng))
        else:
            question = draw_question(table, rng, HARDER if kind < 0.7 else tuple(TASKS))
            lessons.append(_path(question, worked_steps(question, table, rng), learned="work"))
    return lessons


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
        question = draw_any(table, rng)
        makers = [rng.choice((worked_steps, corrupted_steps)) for _ in range(rng.randint(1, 4))]
        paths: list[Sequence[Step]] = [make(question, table, rng) for make in makers]
    else:
        question, paths = sampled[0], list(sampled[1])
        rng.shuffle(paths)
    marks = [mark(path, question, table) for path in paths]
    shown = render_paths([render_steps(path) for path in paths])
    prompt = PROMPTS.render("score", question=question.text, paths=shown, count=len(paths))
    return Lesson((prompt, render_scores(marks)), scoring=True)


def shape_lessons(pairs: Sequence[tuple[str, str]], rng: random.Random) -> list[Lesson]:
    """Questions about a picture of a coloured shape: directly, by steps, and with given steps.

    Args:
        pairs: All questions about the picture with their answers.
        rng: Source of every choice.
    """
    lessons = []
    colour, shape = seen(pairs)
    for k, (question, answer) in enumerate(rng.sample(list(pairs), min(len(pairs), 6))):
        steps = shape_steps(colour, shape, answer)
        if k % 3 == 0:
            prompt = PROMPTS.render("reasoning", question=question)
            turns = (prompt, render_steps(steps), PROMPTS.render("final"), answer)
            lessons.append(Lesson(turns))
        elif k % 6 == 5:
            given = {"question": question, "reasoning": render_steps(steps)}
            lessons.append(Lesson((PROMPTS.render("summary", **given), answer)))
        else:
            role = rng.choice(("direct", "direct", "plain_summary"))
            lessons.append(Lesson((PROMPTS.render(role, question=question), answer)))
    return lessons


def shape_scoring_lesson(pairs: Sequence[tuple[str, str]], rng: random.Random) -> Lesson:
    """One pass over several paths about a coloured shape, some of which saw another one."""
    colour, shape = seen(pairs)
    question, answer = rng.choice(list(pairs))
    shown, marks = [], []
    for _ in range(rng.randint(1, 4)):
        right = rng.random() < 0.5
        if right:
            steps = shape_steps(colour, shape, answer)
        else:
            others = [c for c in COLOURS if c != colour] if rng.random() < 0.6 else []
            other = (rng.choice(others), shape) if others else (colour, _other_form(shape, rng))
            steps = shape_steps(*other, _other_answer(answer, other))
        shown.append(render_steps(steps))
        total = 95 if right else 20
        marks.append(Marks(95, total, 95, total, () if right else (1,)))
    prompt = PROMPTS.render("score", question=question, paths=render_paths(shown), count=len(shown))
    return Lesson((prompt, render_scores(marks)))


def shape_steps(colour: str, shape: str, answer: str) -> tuple[Step, Step]:
    """A path about a coloured shape."""
    what = f"{colour} {shape}".strip()
    return (
        Step("Read shape", what, "continue"),
        Step("Answer", f"answer {answer}", "summary"),
    )


def _other_form(shape: str, rng: random.Random) -> str:
    return rng.choice([form for form in FORMS if form != shape])


def _other_answer(answer: str, seen_as: tuple[str, str]) -> str:
    """What one would answer who saw another colour and shape: never the true answer."""
    if answer in ("yes", "no"):
        return "no" if answer == "yes" else "yes"
    other = seen_as[0] if answer in COLOURS else seen_as[1]
    return other or "unclear"


def _table(table: Table) -> Lesson:
    return Lesson(
        (PROMPTS.render("direct", question=ask_table(table).text), ask_table(table).answer)
    )


def _value(table: Table, label: str) -> Lesson:
    return _direct(ask_value(table, label))


def _direct(question: Ask) -> Lesson:
    return Lesson((PROMPTS.render("direct", question=question.text), question.answer))


def _plain_summary(table: Table, rng: random.Random) -> Lesson:
    question = draw_any(table, rng)
    return Lesson((PROMPTS.render("plain_summary", question=question.text), question.answer))


def _steps(table: Table, rng: random.Random) -> Lesson:
    """A right path, then the answer in a turn of its own."""
    question = draw_any(table, rng)
    return _path(question, worked_steps(question, table, rng))


def _path(
    question: Ask, steps: Sequence[Step], learned: Literal["all", "work", "results"] = "all"
) -> Lesson:
    prompt = PROMPTS.render("reasoning", question=question.text)
    turns = (prompt, render_steps(steps), PROMPTS.render("final"), question.answer)
    return Lesson(turns, learned=learned)


def _drill(rng: random.Random, count: int) -> Lesson:
    """Unconnected lines of calculation."""
    steps = []
    for _ in range(count):
        a, b = (rng.randint(1, rng.choice((20, 40, 40))) for _ in range(2))
        high, low = max(a, b), min(a, b)
        line = rng.choice(
            (
                ("Add", f"{a} + {b} = {a + b}"),
                ("Subtract", f"{high} - {low} = {high - low}"),
                ("Divide", f"{high} / {low} = {ratio_text(high, low)}"),
                ("Double", f"2 x {b} = {2 * b}"),
            )
        )
        steps.append(Step(*line, "continue"))
    return Lesson((PROMPTS.render("table"), render_steps(steps)), learned="results")


def _summary(table: Table, rng: random.Random, question: Ask | None = None) -> Lesson:
    """The answer a given reasoning arrives at, be it right or wrong: trust comes later."""
    question = question or draw_any(table, rng)
    believed = misread(table, question.needed, rng) if rng.random() < 0.5 else table
    followed = solve(question, believed) or question
    steps = worked_steps(followed, believed if followed is not question else table, rng)
    prompt = PROMPTS.render("summary", question=question.text, reasoning=render_steps(steps))
    return Lesson((prompt, followed.answer))


def _judge(table: Table, rng: random.Random) -> Lesson:
    """Whether two answers mean the same."""
    question = draw_any(table, rng)
    other = solve(question, misread(table, question.needed, rng))
    given = other.answer if other is not None and rng.random() < 0.6 else question.answer
    prompt = PROMPTS.render("judge", question=question.text, truth=question.answer, answer=given)
    return Lesson((prompt, "yes" if given == question.answer else "no"))
