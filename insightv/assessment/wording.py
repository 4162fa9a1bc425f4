"""Labels, lists and free text: the true answer's words among others."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Sequence

from insightv.assessment.decision import (
    FILLER,
    NEGATION,
    UNDECIDED,
    Decision,
    RuleConfig,
    normal,
    same,
)
from insightv.assessment.quantities import quantities, tidy
from insightv.records import Question

_BARE_NUMBER = re.compile(r"[-−+]?[\d.,]+%?")
_POINTERS = FILLER | {"first", "second", "third", "last", "left", "right", "both", "all", "two"}


def label(question: Question, text: str, config: RuleConfig) -> Decision:
    """The label alone, or in a sentence whose other words come from the question."""
    truth, spoken = normal(question.answer), normal(text)
    if truth == spoken:
        return Decision(True, "label")
    padded = f" {spoken} "
    if f" {truth} " not in padded:
        return _other_label(question, truth, spoken, text)
    before, after = (part.split() for part in padded.split(f" {truth} ", 1))
    known = FILLER | set(normal(question.text).split())
    rest = [word for word in before + after if word not in known]
    named = not before or before[-1] in ("is", "are", "was", "were", "the", "a", "in", "labeled")
    told = (not after and named) or (
        all(word in FILLER for word in before)
        and after[:1] in (["is"], ["has"], ["was"], ["had"], ["bar"])
    )
    if told and not rest and not NEGATION.search(padded.replace(f" {truth} ", " ", 1)):
        return Decision(True, "label")
    return Decision(None, UNDECIDED, "the true answer among other words")


def _other_label(question: Question, truth: str, spoken: str, text: str) -> Decision:
    values, given = quantities(tidy(question.answer)), quantities(tidy(text))
    numeric = len(values) == 1 and re.fullmatch(r"[\d.,%]+", question.answer.strip())
    if numeric and len(given) == 1 and given[0].value == values[0].value:
        return Decision(True, "label")
    if set(spoken.split()) - FILLER < set(truth.split()) and not set(spoken.split()) <= FILLER:
        return Decision(None, UNDECIDED, "a part of the true answer")
    tail = " ".join(spoken.split()[-len(truth.split()) :])
    if _near(truth, spoken) or _near(truth, tail):
        return Decision(None, UNDECIDED, "close to the true answer")
    words = set(spoken.split())
    if words <= _POINTERS:
        return Decision(None, UNDECIDED, "points without naming")
    return Decision(False, "label" if len(words) <= 4 else "no-match")


def _near(one: str, two: str) -> bool:
    """Plural, abbreviation, misspelling: likely the same thing, not surely."""
    short, long = sorted((one, two), key=len)
    if len(short) >= 3 and (long.startswith(short) or _decade(short) and long.endswith(short)):
        return True
    initials = "".join(word[0] for word in long.split() if word not in ("of", "the", "and"))
    compact = short.replace(".", "").replace(" ", "")
    if len(initials) > 1 and len(compact) < 5 and compact.startswith(initials):
        return True
    return _misspelt(one.split(), two.split())


def _decade(text: str) -> bool:
    return re.fullmatch(r"\d0s", text) is not None


def _misspelt(one: Sequence[str], two: Sequence[str]) -> bool:
    """Whether as many words differ in a letter or two; ``group a`` and ``group b`` do not."""
    if len(one) != len(two):
        return False
    other = [pair for pair in zip(one, two, strict=True) if pair[0] != pair[1]]
    return all(_misspelt_word(*pair) for pair in other)


def _misspelt_word(one: str, two: str) -> bool:
    if min(len(one), len(two)) < 5 or re.search(r"\d", one + two):
        return False
    if one[:-1] == two[:-1]:  # a numbering: grouped by a last letter
        return False
    shared = len(os.path.commonprefix([one, two]))
    if shared >= 5 and shared >= 0.6 * max(len(one), len(two)):
        return True
    return difflib.SequenceMatcher(None, one, two).ratio() >= 0.8


def listing(question: Question, text: str, config: RuleConfig) -> Decision:
    """Item by item, in order where the task asks for one; also inside a sentence."""
    ordered = re.split(r"\W", question.task or " ")[0] in config.ordered_tasks
    truth = [normal(item) for item in question.answer.split(", ")]
    if len(truth) == 1:  # "France and Spain"
        truth = _items(question.answer) or truth
    candidates = [_items(text)]
    if ":" in text:
        candidates.append(_items(text.rsplit(":", 1)[1]))
    elif "/" in text:
        candidates.append(_items(text.replace("/", ",")))
    if all(map(_BARE_NUMBER.fullmatch, truth)):
        # Each item by itself: "1. 1952" is one, and "x = 2 or x = -3" are two.
        values = [q.value for item in _raw_items(text) for q in quantities(tidy(item))]
        wanted = [q.value for item in truth for q in quantities(tidy(item))]
        if (values == wanted if ordered else Counter(values) == Counter(wanted)) and not (
            NEGATION.search(re.sub(r"\b(?:and|or)\b", " ", text.lower()))
        ):
            return Decision(True, "list")
    for items in candidates:
        if items == truth if ordered else _alike(items, truth):
            return Decision(True, "list")
    if re.search(r"[<>]", text) and candidates[-1] == truth[::-1]:
        return Decision(None, UNDECIDED, "the direction of the signs is unclear")
    picked = _picked(question, text, truth)
    if picked is not None:
        return Decision(picked == truth if ordered else True, "list")
    items = candidates[-1]
    if all(word in _POINTERS for item in items for word in item.split()):
        return Decision(None, UNDECIDED, "points without naming")
    if all(len(item.split()) <= 6 for item in items) and not _near_list(items, truth):
        return Decision(False, "list")
    return Decision(None, UNDECIDED, "not plainly a list")


def _items(text: str) -> list[str]:
    return [item for item in map(normal, _raw_items(text)) if item]


def _raw_items(text: str) -> list[str]:
    text = re.sub(r"(?m)^\s*(?:[-*•]|\d+[.)])\s+", "\n", text.strip(" \t.[](){}"))
    text = re.sub(r"(?:^|(?<=[,;\s]))\d+[.)]\s", "\n", text)
    return re.split(r",\s+and\b|,(?!\d{3}\b)|[;\n|>→]|<|\band\b|\bthen\b|&", text)


def _alike(items: Sequence[str], truth: Sequence[str]) -> bool:
    """Equal as multisets; a repeat matters only where the truth itself has one."""
    repeats = len(set(truth)) < len(truth)
    return Counter(items) == Counter(truth) if repeats else set(items) == set(truth)


def _picked(question: Question, text: str, truth: Sequence[str]) -> list[str] | None:
    """The true items in the order they stand in a text that holds nothing else of weight."""
    spoken = f" {normal(text.replace(',', ' , '))} "
    if NEGATION.search(spoken):
        return None
    places = {}
    for item in sorted(set(truth), key=len, reverse=True):
        if spoken.count(f" {item} ") != 1:
            return None
        places[item] = spoken.index(f" {item} ")
        spoken = spoken.replace(f" {item} ", " " * (len(item) + 2))
    known = FILLER | set(normal(question.text).split())
    if len(places) < len(truth) or any(
        w not in known for w in re.sub(r"[<>/]", " ", spoken).split()
    ):
        return None
    return sorted(places, key=places.__getitem__)


def _near_list(items: Sequence[str], truth: Sequence[str]) -> bool:
    """Whether a wrong list differs from the truth by spelling alone."""
    if len(items) != len(truth):
        return False
    pairs = zip(sorted(items), sorted(truth), strict=True)
    return all(one == two or _near(one, two) for one, two in pairs) and set(items) != set(truth)


def _code(text: str) -> str:
    """Letters and digits of a telephone number, a plate and the like; empty for other texts."""
    if not re.fullmatch(r"[(+A-Za-z\d][A-Za-z\d ()+-]+", text) or sum(map(str.isdigit, text)) < 3:
        return ""
    if any(len(word) > 3 for word in re.findall(r"[A-Za-z]+", text)):
        return ""
    return re.sub(r"[ ()+-]", "", text).casefold()


def text_answer(question: Question, text: str, config: RuleConfig) -> Decision:
    """Right when the same but for case, punctuation and words that say nothing; else open.

    Letters and digits of a code (a telephone number, a licence plate) are right whatever
    stands between them, and wrong where both are codes and differ.
    """
    if same(text, question.answer):
        return Decision(True, "exact")
    truth, given = _code(question.answer), _code(text)
    if truth and given and (truth == given or not given.endswith(truth)):
        return Decision(truth == given, "code")
    if label(question, text, config).correct:
        return Decision(True, "text")
    return Decision(None, UNDECIDED, "free text that differs")
