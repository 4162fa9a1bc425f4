"""The command that shows how a question set reads, before a chain asks it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from hpc.errors import UserError, printable
from insightv.cli.runs import Overrides

SHOWN = 3


def questions(
    mapping: Annotated[
        Path, typer.Argument(metavar="SET", help="A question set (YAML), configs/data/….")
    ],
    overrides: Overrides = None,
    folder: Annotated[Path, typer.Option(help="Where the folders of sets lie.")] = Path(),
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    most: Annotated[int, typer.Option(min=0, help="Questions to draw; 0: all.")] = 200,
    network: Annotated[bool, typer.Option("--network", help="Read from the hub.")] = False,
) -> None:
    """Read some questions of a set: how many of what kind, what is left out and why."""
    from insightv.questions import Asked, Place, count_questions, load_set, read_questions
    from insightv.questions.media import Nowhere

    chosen, place = load_set(mapping, overrides or ()), Place(folder, network)
    if split not in chosen.splits:
        raise UserError(f"{mapping}: no split {split!r}; it has {', '.join(chosen.splits)}")
    kinds: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    pictures: Counter[int] = Counter()
    for found in read_questions(chosen, split, place, Nowhere(), most):
        if not isinstance(found, Asked):
            dropped[f"{'broken' if found.broken else 'left out'}: {found.reason}"] += 1
            continue
        question = found.question
        if kinds.total() < SHOWN:
            print(f"{question.key}  {_plain(question.text)}")
            print(f"  {question.answer_type}: {_plain(question.answer)}")
        kinds[question.answer_type] += 1
        pictures[len(question.pictures)] += 1
    rows = count_questions(chosen, split, place)
    known = f" of some {rows:,} rows" if rows else ""
    print(f"{chosen.name}, {split}: {kinds.total():,} questions{known}; {_told(kinds)}")
    print("pictures of a question: " + _told({f"{n}": c for n, c in sorted(pictures.items())}))
    for reason, number in dropped.most_common():
        print(f"{number:,} {_plain(reason)}")


def _told(counts: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "none"


def _plain(text: str) -> str:
    """On one line, cut."""
    return printable(" ⏎ ".join(text.splitlines()))[:300]


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command("questions", rich_help_panel="Single steps")(questions)
