"""Days and times of day, in the notations of documents."""

from __future__ import annotations

import re
from collections.abc import Iterator

from insightv.assessment.decision import NEGATION, UNDECIDED, Decision

Moment = tuple[int, ...]
"""Year, month and day, or hour and minute."""

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = rf"((?:{'|'.join(_MONTHS)})[a-z]*)\.?"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_PATTERNS = {
    "mdy": re.compile(rf"\b{_MONTH}\s{_DAY},?\s(\d{{4}})\b"),
    "dmy": re.compile(rf"\b{_DAY}\s(?:of\s)?{_MONTH},?\s(\d{{4}})\b"),
    "ymd": re.compile(r"(?<!\d)(\d{4})([-/.])(\d{1,2})\2(\d{1,2})(?!\d)"),
    "figures": re.compile(r"(?<!\d)(\d{1,2})([-/.])(\d{1,2})\2(\d{4})(?!\d)"),
    "time": re.compile(r"(?<![\d.:])(\d{1,2})[:.](\d{2})(?![\d:%])\s?([ap])?\.?(m\b\.?)?"),
}


def moment(truth: str, text: str) -> Decision | None:
    """Compares dates and times by what they mean.

    Returns:
        None where the true answer is no date or time, or the text holds none or several.
        Undecided where a notation can be read in two ways, one of them right.
    """
    wanted = list(_moments(truth, alone=True))
    given = list(_moments(text))
    if len(wanted) != 1 or len(given) != 1 or NEGATION.search(text.lower()):
        return None
    (kind, right), (given_kind, readings) = wanted[0], given[0]
    if kind != given_kind:
        return None
    if right == readings and len(right) == 1:
        return Decision(True, "date")
    if not right & readings:
        return Decision(False, "date")
    return Decision(None, UNDECIDED, "a date that can be read in two ways")


def _moments(text: str, alone: bool = False) -> Iterator[tuple[str, set[Moment]]]:
    """Every date and time of a text with its readings; ``alone``: only if it is all there is."""
    spoken = " ".join(text.casefold().split()).strip(" .")
    for name, pattern in _PATTERNS.items():
        for match in pattern.finditer(spoken):
            if alone and match[0].strip(" .") != spoken:
                continue
            readings = set(_readings(name, match))
            if readings:
                yield ("time" if name == "time" else "day"), readings
        if name != "time":
            spoken = pattern.sub(" ", spoken) if not alone else spoken


def _readings(name: str, match: re.Match[str]) -> Iterator[Moment]:
    if name == "time":
        hour, minute, half = int(match[1]), int(match[2]), match[3] if match[4] else None
        if hour > 23 or minute > 59 or (not half and match[0][len(match[1])] == "."):
            return  # "14.67" is a number
        if half:
            yield hour % 12 + 12 * (half == "p"), minute
        else:
            yield hour, minute
            if 1 <= hour <= 12 and not match[1].startswith("0"):
                yield (hour + 12) % 24, minute
        return
    if name == "mdy":
        days = [(int(match[3]), _MONTHS.index(match[1][:3]) + 1, int(match[2]))]
    elif name == "dmy":
        days = [(int(match[3]), _MONTHS.index(match[2][:3]) + 1, int(match[1]))]
    elif name == "ymd":
        days = [(int(match[1]), int(match[3]), int(match[4]))]
    else:  # 03/04/2021: American or European
        one, two, year = int(match[1]), int(match[3]), int(match[4])
        days = [(year, one, two), (year, two, one)]
    yield from (day for day in days if 1 <= day[1] <= 12 and 1 <= day[2] <= 31)
