"""Questions about charts: what is asked, the true answer, and the steps that lead to it.

A task is a pair of small functions: ``pick`` draws the arguments of a question that the
table allows, ``solve`` answers a question with given arguments on any table. Solving
the same question on a misread table tells what follows from the misreading: that is how
paths are corrupted, and checked, in the pretraining of the embedded model. Question
sets use only the question's text and its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from insightv.records import AnswerType, Step

Table = dict[str, int]
Args = tuple[Any, ...]


@dataclass(frozen=True)
class Ask:
    """A question about a table, solved.

    Attributes:
        task: Name of the kind of question.
        args: What it asks about (labels, a limit, a direction); with the table, all of it.
        text: The question as it is put.
        answer: The true answer in canonical text.
        answer_type: How answers are compared.
        needed: Labels whose values must be read, in drawing order.
        work: The lines of work between reading and concluding, as (title, content).
        options: For ``choice``: the texts of (A), (B), ….
    """

    task: str
    args: Args
    text: str
    answer: str
    answer_type: AnswerType
    needed: tuple[str, ...]
    work: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()


def readings(table: Table, labels: Sequence[str] | None = None) -> str:
    """``Jan 5, Mar 9``: values of the labels (all by default), in the order given."""
    return ", ".join(f"{label} {table[label]}" for label in (table if labels is None else labels))


def ratio_text(numerator: int, denominator: int) -> str:
    """A quotient rounded half up to one decimal; whole numbers without a decimal."""
    tenths = (20 * numerator + denominator) // (2 * denominator)
    return str(tenths // 10) if tenths % 10 == 0 else f"{tenths // 10}.{tenths % 10}"


def _two(table: Table, rng: random.Random) -> Args:
    return (*rng.sample(list(table), 2), rng.randrange(2))


def _either(table: Table, rng: random.Random) -> Args:
    return (rng.randrange(2),)


def _nothing(table: Table, rng: random.Random) -> Args:
    return ()


def _only(values: dict[str, int], wanted: int) -> str | None:
    """The one label with the wanted value, or None if several have it."""
    holders = [label for label, value in values.items() if value == wanted]
    return holders[0] if len(holders) == 1 else None


def _difference(table: Table, args: Args) -> Ask | None:
    a, b, wording = args
    high, low = max(table[a], table[b]), min(table[a], table[b])
    what = "How far apart are" if wording else "What is the difference between"
    work = (("Subtract", f"{high} - {low} = {high - low}"),)
    return Ask("difference", args, f"{what} {a} and {b}?", str(high - low), "number", (a, b), work)


def _sum(table: Table, args: Args) -> Ask | None:
    a, b, wording = args
    text = f"How much are {a} and {b} together?" if wording else f"What is the sum of {a} and {b}?"
    total = table[a] + table[b]
    work = (("Add", f"{table[a]} + {table[b]} = {total}"),)
    return Ask("sum", args, text, str(total), "number", (a, b), work)


def _ratio(table: Table, args: Args) -> Ask | None:
    a, b, _ = args
    answer = ratio_text(table[a], table[b])
    text = f"How many times as large as {b} is {a}?"
    work = (("Divide", f"{table[a]} / {table[b]} = {answer}"),)
    return Ask("ratio", args, text, answer, "number", (a, b), work)


def _pick_ratio(table: Table, rng: random.Random) -> Args | None:
    a, b, wording = _two(table, rng)
    return (a, b, wording) if table[b] < table[a] <= 9 * table[b] else None


def _count_above(table: Table, args: Args) -> Ask | None:
    limit, wording = args
    above = [label for label in table if table[label] > limit]
    text = f"How many are larger than {limit}?" if wording else f"How many are above {limit}?"
    work = (("Compare", f"above {limit}: {readings(table, above) if above else 'none'}"),)
    return Ask("count_above", args, text, str(len(above)), "number", tuple(table), work)


def _pick_limit(table: Table, rng: random.Random) -> Args:
    return (rng.randint(min(table.values()), max(table.values())), rng.randrange(2))


def _extreme(table: Table, args: Args) -> Ask | None:
    word, value = ("highest", max(table.values())) if args[0] else ("lowest", min(table.values()))
    label = _only(table, value)
    if label is None:
        return None
    work = (("Compare", f"{word} {value}"),)
    return Ask("extreme", args, f"Which is the {word}?", label, "label", tuple(table), work)


def _order(table: Table, args: Args) -> Ask | None:
    if len(set(table.values())) < len(table) or len(table) > 5:
        return None
    labels = sorted(table, key=lambda label: table[label], reverse=bool(args[0]))
    ends = "highest to lowest" if args[0] else "lowest to highest"
    work = (("Sort", readings(table, labels)),)
    answer = ", ".join(labels)
    return Ask("order", args, f"Order from {ends}.", answer, "list", tuple(table), work)


def _trend(table: Table, args: Args) -> Ask | None:
    labels = list(table)[: args[0]]
    values = [table[label] for label in labels]
    steps = list(zip(values, values[1:], strict=False))
    letter = "A" if all(a < b for a, b in steps) else "B" if all(a > b for a, b in steps) else "C"
    span = f"From {labels[0]} to {labels[-1]}"
    text = f"{span} do the values (A) only rise, (B) only fall, (C) neither?"
    signs = " ".join("up" if b > a else "down" if b < a else "same" for a, b in steps)
    work = (("Compare", signs),)
    options = ("only rise", "only fall", "neither")
    return Ask("trend", args, text, letter, "choice", tuple(labels), work, options)


def _pick_trend(table: Table, rng: random.Random) -> Args:
    return (rng.randint(3, len(table)),)


def _change(table: Table, args: Args) -> Ask | None:
    labels = list(table)
    changes = {b: abs(table[b] - table[a]) for a, b in zip(labels, labels[1:], strict=False)}
    most = max(changes.values())
    label = _only(changes, most)
    if label is None:
        return None
    work = (("Subtract", readings(changes)), ("Compare", f"largest {most}"))
    text = "Which changed most from the one before?"
    return Ask("change", args, text, label, "label", tuple(table), work)


def _range(table: Table, args: Args) -> Ask | None:
    high, low = max(table.values()), min(table.values())
    text = "What is the difference between the highest and the lowest?"
    work = (
        ("Compare", f"highest {high}, lowest {low}"),
        ("Subtract", f"{high} - {low} = {high - low}"),
    )
    return Ask("range", args, text, str(high - low), "number", tuple(table), work)


def _top_two(table: Table, args: Args) -> Ask | None:
    first, second = sorted(table.values(), reverse=True)[:2]
    text = "What do the two highest add up to?"
    work = (
        ("Compare", f"highest {first}, then {second}"),
        ("Add", f"{first} + {second} = {first + second}"),
    )
    return Ask("top_two", args, text, str(first + second), "number", tuple(table), work)


def _twice(table: Table, args: Args) -> Ask | None:
    a, b, _ = args
    double = 2 * table[b]
    sign = ">" if table[a] > double else "<" if table[a] < double else "="
    work = (("Double", f"2 x {table[b]} = {double}"), ("Compare", f"{table[a]} {sign} {double}"))
    answer = "yes" if table[a] > double else "no"
    return Ask("twice", args, f"Is {a} more than twice {b}?", answer, "yes_no", (a, b), work)


def _pick_twice(table: Table, rng: random.Random) -> Args | None:
    """Arguments near the boundary, so that yes and no are equally likely."""
    a, b, wording = _two(table, rng)
    if table[a] < table[b]:
        a, b = b, a
    wanted = rng.random() < 0.5
    return (a, b, wording) if (table[a] > 2 * table[b]) == wanted else None


def _closest(table: Table, args: Args) -> Ask | None:
    (target,) = args
    gaps = {label: abs(value - target) for label, value in table.items()}
    least = min(gaps.values())
    label = _only(gaps, least)
    if label is None:
        return None
    work = (("Subtract", readings(gaps)), ("Compare", f"smallest {least}"))
    text = f"Which is closest to {target}?"
    return Ask("closest", args, text, label, "label", tuple(table), work)


def _pick_target(table: Table, rng: random.Random) -> Args:
    return (rng.randint(max(1, min(table.values()) - 2), max(table.values()) + 2),)


Pick = Callable[[Table, random.Random], Args | None]
Solve = Callable[[Table, Args], Ask | None]
TASKS: dict[str, tuple[Pick, Solve]] = {
    "difference": (_two, _difference),
    "sum": (_two, _sum),
    "ratio": (_pick_ratio, _ratio),
    "count_above": (_pick_limit, _count_above),
    "extreme": (_either, _extreme),
    "order": (_either, _order),
    "trend": (_pick_trend, _trend),
    "change": (_nothing, _change),
    "range": (_nothing, _range),
    "top_two": (_nothing, _top_two),
    "twice": (_pick_twice, _twice),
    "closest": (_pick_target, _closest),
}
"""The reasoning tasks by name."""


def ask(table: Table, rng: random.Random, task: str) -> Ask | None:
    """A question of the given task with arguments drawn at random.

    Returns:
        None when the table does not allow it (a tie for the highest, say).
    """
    pick, solve_task = TASKS[task]
    args = pick(table, rng)
    return None if args is None else solve_task(table, args)


def solve(question: Ask, table: Table) -> Ask | None:
    """The same question answered on another table; None where that one has no answer."""
    if question.task == "value":
        return ask_value(table, *question.args)
    if question.task == "transcribe":
        return ask_table(table)
    return TASKS[question.task][1](table, question.args)


def ask_value(table: Table, label: str) -> Ask:
    """Reading one value: a question of perception."""
    text = f"What is the value of {label}?"
    return Ask("value", (label,), text, str(table[label]), "number", (label,))


def ask_table(table: Table) -> Ask:
    """Transcribing the whole chart: a question of perception."""
    text = "List every label with its value."
    return Ask("transcribe", (), text, readings(table), "list", tuple(table))


def worked_steps(question: Ask, table: Table, rng: random.Random) -> tuple[Step, ...]:
    """A path to the question's answer, in one of several ways of going about it.

    Args:
        question: A question as solved on ``table``.
        table: What was read; the first steps state these values.
        rng: Chooses between reading all or only what is needed, at once or in two steps.
    """
    everything = rng.random() < 0.3
    labels = list(table if everything else question.needed)
    if len(labels) > 3 and rng.random() < 0.2:
        half = len(labels) // 2
        parts = [("Read values", labels[:half]), ("Read the rest", labels[half:])]
    else:
        parts = [("Read all values" if len(labels) == len(table) else "Read values", labels)]
    steps = [Step(title, readings(table, part), "continue") for title, part in parts]
    steps += [Step(title, content, "continue") for title, content in question.work]
    conclude = rng.choice(("Conclude", "Answer"))
    return (*steps, Step(conclude, f"answer {question.answer}", "summary"))
