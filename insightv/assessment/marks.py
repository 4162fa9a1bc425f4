"""What a scorer says of a path, and reading it from what scorers really write."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

CRITERIA = ("logic", "grounding", "completeness")


@dataclass(frozen=True)
class Marks:
    """Scores of one path, whole numbers 1–100; None where a criterion was left out.

    Attributes:
        logic: Does each step follow from those before it.
        grounding: Freedom from made-up details.
        completeness: No necessary step skipped.
        total: The overall score; None only for a path without scores.
        bad_steps: 1-based numbers of the wrong steps.
    """

    logic: int | None
    grounding: int | None
    completeness: int | None
    total: int | None
    bad_steps: tuple[int, ...] = ()


_ALIASES = {
    "overall": "total",
    "overall_score": "total",
    "total_score": "total",
    "score": "total",
    "number": "path",
    "path_number": "path",
    "id": "path",
    "wrong_steps": "bad_steps",
}
_PAIR = re.compile(
    r"""["'“]?([A-Za-z][A-Za-z_ ]{0,20})["'“”]?\s{0,3}[:=]\s{0,3}"""
    r"""(\[[^\[\]{}]*\]|"[^"{}]*"|'[^'{}]*'|[^,\n{}\[\]"']+)"""
)


def parse_scores(
    text: str, count: int, steps: Sequence[int] | None = None
) -> tuple[dict[int, Marks], list[str]]:
    """Reads a scorer's reply, whatever stands around its objects.

    Fences, prose, single quotes, trailing commas, an enclosing list, floats, ``85/100``, ``8/10``
    and ``85 %`` are understood; a missing total is the mean of the three criteria. A score
    outside 1–100 is not clamped, it makes the line a problem: such a scorer did not follow the
    scale. An object without its closing brace was cut off and does not count.

    Args:
        text: The reply.
        count: How many paths were shown.
        steps: How many steps each has; flags beyond are dropped.

    Returns:
        Marks by path number (1-based), and the problems in words.
    """
    objects = [_pairs(body) for body in re.findall(r"\{([^{}]*)\}", text)]
    objects = [pairs for pairs in objects if set(pairs) & {*CRITERIA, "total"}]
    if not objects:
        return {}, ["no JSON object with scores"]
    problems: list[str] = []
    found: dict[int, Marks] = {}
    refused: set[int] = set()
    for number, pairs in zip(_numbers(objects, count, problems), objects, strict=True):
        if number is None:
            continue
        marks, problem = _marks(pairs, steps[number - 1] if steps else None)
        if marks is None:
            problems.append(f"path {number}: {problem}")
        elif found.get(number, marks) != marks:
            problems.append(f"path {number}: scored twice, differently")
            refused.add(number)
        else:
            found[number] = marks
    found = {number: marks for number, marks in found.items() if number not in refused}
    missing = [str(number) for number in range(1, count + 1) if number not in found]
    if missing:
        problems.append(f"no scores for path {', '.join(missing)}")
    return found, problems


def shift(marks: Marks, anchors: Sequence[tuple[Marks, Marks]]) -> Marks:
    """Moves each criterion by the anchors' mean difference, kept within 1–100.

    Args:
        marks: Scores of one pass.
        anchors: The anchors' scores in this pass and in the reference pass.
    """
    moved: dict[str, int | None] = {}
    for name in (*CRITERIA, "total"):
        value = getattr(marks, name)
        gaps = [
            there - here
            for own, reference in anchors
            if (here := getattr(own, name)) is not None
            and (there := getattr(reference, name)) is not None
        ]
        if value is not None and gaps:
            value = min(100, max(1, round(value + fmean(gaps))))
        moved[name] = value
    return Marks(**moved, bad_steps=marks.bad_steps)


def _pairs(body: str) -> dict[str, str]:
    pairs = {}
    for name, value in _PAIR.findall(body):
        name = re.sub(r"\s+", "_", name.strip().lower())
        pairs[_ALIASES.get(name, name)] = value.strip().strip("\"'").strip()
    return pairs


def _numbers(
    objects: Sequence[dict[str, str]], count: int, problems: list[str]
) -> list[int | None]:
    """The path each object speaks of; by order where none says and all are there."""
    said = [re.search(r"\d{1,6}", pairs.get("path", "")) for pairs in objects]
    if not any(said):
        if len(objects) == count:
            return list(range(1, count + 1))
        problems.append(f"{len(objects)} lines without numbers for {count} paths")
        return [None] * len(objects)
    numbers = [int(match[0]) if match else None for match in said]
    if 0 in numbers and sorted(n for n in numbers if n is not None) == list(range(count)):
        return [None if number is None else number + 1 for number in numbers]  # counted from 0
    kept: list[int | None] = []
    for number in numbers:
        if number is None or not 1 <= number <= count:
            problems.append(f"there is no path {number}" if number is not None else "no number")
            kept.append(None)
        else:
            kept.append(number)
    return kept


def _marks(pairs: dict[str, str], steps: int | None) -> tuple[Marks | None, str]:
    values: dict[str, int | None] = {}
    for name in (*CRITERIA, "total"):
        raw = pairs.get(name, "null")
        if raw.lower() in ("null", "none", "", "n/a"):
            values[name] = None
            continue
        value = _score(raw)
        if value is None:
            return None, f"{name} is {raw[:20]!r}"
        if not 1 <= value <= 100:
            return None, f"{name} is {raw[:20]}, outside 1-100"
        values[name] = value
    three = [value for name in CRITERIA if (value := values[name]) is not None]
    if values["total"] is None:
        if len(three) < 3:
            return None, "no total, and not all three criteria"
        values["total"] = round(fmean(three))
    flags = sorted({int(digits) for digits in re.findall(r"\d{1,4}", pairs.get("bad_steps", ""))})
    inside = tuple(flag for flag in flags if flag >= 1 and (steps is None or flag <= steps))
    return Marks(**values, bad_steps=inside), ""


def _score(raw: str) -> int | None:
    """``85``, ``85.4``, ``85/100``, ``8/10``, ``85 %``, ``85 points``; None for anything else."""
    pattern = r"(-?\d+(?:\.\d+)?)\s*(?:/\s*(10|100)|%|points?|out of (10|100))?"
    match = re.fullmatch(pattern, raw.strip())
    if not match:
        return None
    value = float(match[1]) * (10 if "10" in (match[2], match[3]) else 1)
    return round(value) if math.isfinite(value) and abs(value) < 1e6 else None
