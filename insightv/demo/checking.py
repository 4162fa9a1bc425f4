"""Marks of a path about a chart whose table is known: the teacher of the embedded scorer.

Used in pretraining only, on charts drawn from random tables. At run time the scorer
sees the picture, the question and the paths, nothing else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from insightv.assessment.scoring import Marks
from insightv.demo.asking import Ask, Table, solve, worked_steps
from insightv.records import Step

_READING = re.compile(r"(\w+) (\d+)(?=,|$)")
_GROUNDING, _LOGIC, _COMPLETENESS = (95, 50, 20), (95, 40, 20), (95, 45, 25)


def mark(steps: Sequence[Step], question: Ask, table: Table) -> Marks:
    """Checks a path against the true table and against its own readings.

    Every misread value lowers ``grounding``, every line of work that does not follow from
    the path's own readings ``logic``, everything left out ``completeness``; ``total`` is
    the least of the three: a path is as good as its worst side.
    """
    read: Table = {}
    misread, wrong = [], []
    for number, step in enumerate(steps, 1):
        if step.title.startswith("Read"):
            stated = {label: int(value) for label, value in _READING.findall(step.content)}
            if any(table.get(label) != value for label, value in stated.items()):
                misread.append(number)
            read |= stated
    errors = sum(table.get(label) != value for label, value in read.items())
    missing = sum(label not in read for label in question.needed)
    believed = {label: read.get(label, value) for label, value in table.items()}
    expected = solve(question, believed)
    lines = [(n, s) for n, s in enumerate(steps, 1) if not s.title.startswith("Read")]
    work, conclusion = lines[:-1], lines[-1:]
    if expected is not None:
        for title, content in expected.work:
            found = [(n, s) for n, s in work if s.title == title]
            if not found:
                missing += 1
            elif found[0][1].content != content:
                wrong.append(found[0][0])
        if not conclusion or conclusion[0][1].next_action != "summary":
            missing += 1
        elif not wrong and conclusion[0][1].content != f"answer {expected.answer}":
            wrong.append(conclusion[0][0])
    logic = _LOGIC[min(2, len(wrong))]
    grounding = _GROUNDING[min(2, errors)]
    completeness = _COMPLETENESS[min(2, missing)]
    total = min(logic, grounding, completeness)
    return Marks(logic, grounding, completeness, total, tuple(sorted({*misread, *wrong})))


def misread(table: Table, labels: Sequence[str], rng: random.Random) -> Table:
    """The table with one or two of the given labels' values a little, or a lot, off."""
    wrong = dict(table)
    for label in rng.sample(list(labels), min(len(labels), rng.choice((1, 1, 1, 2)))):
        others = [value for name, value in table.items() if name != label]
        if rng.random() < 0.25:  # the value of another mark
            value = rng.choice(others)
        else:
            value = table[label] + rng.choice((-5, -3, -2, -1, -1, 1, 1, 2, 3, 5))
        wrong[label] = min(40, max(1, value))
    return wrong


def corrupted_steps(question: Ask, table: Table, rng: random.Random) -> tuple[Step, ...]:
    """A path spoilt in a known way: a misread mark, a wrong line of work, a missing step."""
    way = rng.choices(("misread", "work", "missing"), (5, 3, 2))[0] if question.work else "misread"
    if way == "misread":
        believed = misread(table, question.needed, rng)
        followed = solve(question, believed)
        if followed is not None:
            return worked_steps(followed, believed, rng)
    steps = list(worked_steps(question, table, rng))
    if not question.work:  # nothing to spoil but the conclusion
        return (*steps[:-1], replace(steps[-1], content="answer unclear"))
    lines = [k for k, step in enumerate(steps[:-1]) if not step.title.startswith("Read")]
    k = rng.choice(lines)
    if way == "missing":
        return tuple(steps[:k] + steps[k + 1 :])
    other = solve(question, misread(table, question.needed, rng))
    if other is None or (steps[k].title, steps[k].content) in other.work:
        return tuple(steps[:k] + steps[k + 1 :])
    content = next((c for title, c in other.work if title == steps[k].title), steps[k].content)
    # A slip in the result of the line, from which the conclusion follows.
    steps[k] = replace(steps[k], content=_spoil(steps[k].content, content))
    if rng.random() < 0.7:
        steps[-1] = replace(steps[-1], content=f"answer {other.answer}")
    return tuple(steps)


def _spoil(content: str, other: str) -> str:
    """Keeps the line's left side and takes the other line's result."""
    if " = " in content and " = " in other:
        return content.rsplit(" = ", 1)[0] + " = " + other.rsplit(" = ", 1)[1]
    return other
