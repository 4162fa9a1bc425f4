"""What curation reads: a question's paths with their verdicts and scores, one group at a time."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpc.errors import UserError
from hpc.stages import Row
from insightv.assessment.scoring import RETEST
from insightv.records import Question, ReasoningPath, seed_for
from insightv.steps import render_steps

Group = tuple[str, Mapping[str, list[Row]]]
"""A question's key and its rows by role: questions, paths, verdicts, scores."""
Groups = Callable[[], Iterable[Group]]
"""Begins a fresh pass over all groups (``lambda: hpc.shards.join(…)``)."""
PlainQuestions = Callable[[], Iterable[Question]]
"""Begins a fresh pass over questions to be answered directly."""


class Judged:
    """A path with its verdict and score; parsed and rendered only when asked."""

    def __init__(self, row: Row, correct: bool | None, total: int | None):
        """Takes the path's row as stored."""
        self._row, self.correct, self.total = row, correct, total
        self.key: str = row["key"]

    @cached_property
    def path(self) -> ReasoningPath:
        """The path's record."""
        return ReasoningPath.from_json(self._row)

    @cached_property
    def text(self) -> str:
        """Its canonical step lines."""
        return render_steps(self.path.steps)

    @property
    def conclusion(self) -> str:
        """What the last step says."""
        return self.path.steps[-1].content

    @property
    def finished(self) -> bool:
        """Whether the model ended the path itself."""
        return bool(self._row["finish"] == "summary")

    @property
    def round(self) -> str:
        """The part of the key that names the round."""
        match = re.search(r"/(r\d+)/p\d+$", self.key)
        return match[1] if match else ""


@dataclass
class Case:
    """One question and its judged paths."""

    question: Question
    paths: list[Judged]


def cases(groups: Groups, counts: Counter[str]) -> Iterator[Case]:
    """Joins each group's rows by path; counts questions, paths and what became of them.

    Paths without a verdict (failed ones) are counted and left out; scores of the second
    scoring (``retest``) are ignored.
    """
    for key, rows in groups():
        if not rows.get("questions"):
            raise UserError(f"{key} has paths but no question: remake the questions stage")
        counts["questions"] += 1
        verdicts = {row["path"]: row["correct"] for row in rows.get("verdicts", ())}
        totals = {
            row["path"]: row["total"]
            for row in rows.get("scores", ())
            if not row["reason"].startswith(RETEST)
        }
        judged = []
        for row in rows.get("paths", ()):
            counts["paths"] += 1
            if row.get("key") not in verdicts:
                counts["paths failed"] += 1
                continue
            correct = verdicts[row["key"]]
            counts["paths " + {True: "right", False: "wrong", None: "undecided"}[correct]] += 1
            judged.append(Judged(row, correct, totals.get(row["key"])))
        yield Case(Question.from_json(rows["questions"][0]), judged)


class Draws:
    """The draws of all candidates, 8 bytes each, to find where a seeded sample ends."""

    def __init__(self) -> None:
        """Starts empty."""
        self._draws = array("Q")

    def __len__(self) -> int:
        return len(self._draws)

    def add(self, draw: int) -> None:
        """Notes one candidate's draw."""
        self._draws.append(draw)

    def limit(self, size: int | None) -> int:
        """The largest draw that belongs to a sample of ``size``; -1 for an empty one."""
        if size is None or size >= len(self._draws):
            return 2**64
        if size <= 0:
            return -1
        draws = np.frombuffer(self._draws, dtype=np.uint64)
        return int(np.partition(draws, size - 1)[size - 1])


def draw(seed: int, kind: str, key: str) -> int:
    """A candidate's place in the lottery: depends on seed, set and key alone."""
    return seed_for(seed, "curation", kind, key)


SCALES = ("percentile", "score")


def histogram(groups: Groups) -> list[int]:
    """How many right paths have each total, 0–100."""
    counts = [0] * 101
    for case in cases(groups, Counter()):
        for judged in case.paths:
            if judged.correct and judged.total is not None:
                counts[judged.total] += 1
    return counts


def cut(scale: str, value: int, totals: Sequence[int] | None) -> int:
    """The score a threshold means.

    Args:
        scale: ``score``: the value itself; ``percentile``: the largest score below which at most
            ``value`` percent of all right paths lie.
        value: The threshold.
        totals: As ``histogram`` returns it; unused for ``score``.
    """
    if scale == "score" or totals is None:
        return value
    below, everything, score = 0, sum(totals), 0
    for total, count in enumerate(totals):
        if below * 100 > value * everything:
            break
        score, below = total, below + count
    return score


def check_scale(name: str, scale: str) -> None:
    """Refuses a scale there is not.

    Raises:
        UserError: With the ones there are.
    """
    if scale not in SCALES:
        raise UserError(f"{name} is {scale!r}: use {' or '.join(SCALES)}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuses a value outside ``low``–``high``.

    Raises:
        UserError: With the range.
    """
    if not low <= value <= high:
        raise UserError(f"{name} is {value}: use a value from {low:g} to {high:g}")
