"""Options and yes or no: letters, their texts, and the two in conflict."""

from __future__ import annotations

import re

from insightv.assessment.decision import UNDECIDED, Decision, RuleConfig, normal
from insightv.assessment.numeric import equal
from insightv.assessment.quantities import quantities, tidy
from insightv.records import Question

_NOT = re.compile(r"\b(?:not|never|nor|neither|instead|except|unlike|but)\b|n['’]t\b", re.I)
_MEANINGS = {
    **dict.fromkeys(("yes", "yeah", "yep", "true", "correct", "y"), True),
    **dict.fromkeys(("no", "nope", "false", "incorrect", "n"), False),
}


def choice(question: Question, text: str, config: RuleConfig) -> Decision:
    """By letter, by the option's text, or both; a letter beside another option's text is open."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(question.options)]
    truth = _true_letter(question, letters)
    if truth is None:
        return Decision(None, UNDECIDED, "the true answer is none of the options")
    named, told = _letters(text), _options(question, text, letters, config)
    chosen = named | told
    if not chosen:
        return Decision(None, UNDECIDED, "names no option")
    if _NOT.search(text) and not _NOT.search(" ".join(question.options)):
        return Decision(None, UNDECIDED, "negated")
    if len(named) == 1 and len(told) == 1 and named != told:
        return Decision(None, UNDECIDED, "letter and text conflict")
    rule = "choice-letter" if named else "choice-text"
    if chosen == {truth}:
        return Decision(True, rule)
    if truth not in chosen:
        several = "several options, none of them right" if len(chosen) > 1 else ""
        return Decision(False, rule, several)
    return Decision(None, UNDECIDED, "names several options")


def _true_letter(question: Question, letters: str) -> str | None:
    texts = [normal(option) for option in question.options]
    if normal(question.answer) in texts:
        return letters[texts.index(normal(question.answer))]
    match = re.match(r"\(?([A-Z])\)?(?:[.):\s]|$)", question.answer.strip())
    return match[1] if match and match[1] in letters else None


def _letters(text: str) -> set[str]:
    """Option letters a text names: alone, in brackets, before a dot, after ``option``."""
    text = text.strip().strip("*`\"'")
    if match := re.fullmatch(r"[(\[]?([A-Za-z])[)\]]?[.:]?", text):
        return {match[1].upper()}
    patterns = (
        r"\(([A-Z])\)",
        r"^([A-Za-z])[.):]\s",
        r"\b(?i:option|choice|letter)\s+\(?([A-Za-z])\b",
        r"(?:\bis|:)\s+\(?([B-HJ-Z])\)?(?:[.,:)]|$|\s+(?:or|and|because|since)\b)",
        r"(?:\bis|:)\s+\(?([A-Z])\)?(?:[.:)]|$)",
        r"^\(?([B-HJ-Z])\)?(?=\s*(?:,|/|-|or\b|and\b|because\b))",
        r"\b(?:or|and)\s+\(?([B-HJ-Z])\)?[.]?$",
        r"\b([A-Z])\)?\s+(?:or|and)\s+\(?[A-Z]\b",
        r"\b(?:choose|chose|pick|select|with)\s+\(?([A-Z])\b",
        r"^\(?([A-Z])\)?\s+(?:is|seems|would)\b",
    )
    return {letter.upper() for pattern in patterns for letter in re.findall(pattern, text)}


def _options(question: Question, text: str, letters: str, config: RuleConfig) -> set[str]:
    """Letters of the options whose text stands in the answer, longest text first."""
    spoken = f" {normal(re.sub(r'^[(]?[A-Z][).:]+ ', '', text))} "
    told = set()
    by_length = sorted(zip(letters, question.options, strict=True), key=lambda o: -len(o[1]))
    for letter, option in by_length:
        words = normal(option)
        if len(words) > 1 or words.isdigit() or spoken.strip() == words:
            pattern = f" {words} " if words else "\0"
            if pattern in spoken:
                told.add(letter)
                spoken = spoken.replace(pattern, "  ")
    values = [quantities(tidy(option)) for option in question.options]
    given = quantities(tidy(text))
    if not told and all(len(value) == 1 for value in values) and len(given) == 1:
        told = {
            letter
            for letter, value in zip(letters, values, strict=True)
            if equal(question, value[0], given[0], config)
        }
    return told


def yes_no(question: Question, text: str, config: RuleConfig) -> Decision:
    """By the first word or the last, unless both words are used."""
    truth = _MEANINGS.get(normal(question.answer))
    if truth is None:
        return Decision(None, UNDECIDED, "the true answer is neither yes nor no")
    said = normal(text)
    words = said.split() or [""]
    first = _MEANINGS.get(words[0])
    if first is not None and not _takes_back(words, first):
        return Decision(first == truth, "yes-no")
    last = re.search(r"\b(?:(?:that|this|it) is|answer is|so|definitely|clearly) (\w+)$", said)
    other = {"yes", "no", "not"} & set(words[:-1])
    if first is None and last and not other and last[1] in _MEANINGS:
        return Decision(_MEANINGS[last[1]] == truth, "yes-no")
    return Decision(None, UNDECIDED, "neither plainly yes nor plainly no")


def _takes_back(words: list[str], first: bool) -> bool:
    """Whether a reply that begins with yes or no goes on to the contrary.

    "Yes, there are no red bars" does not; "yes and no", "no, yes it is", "no red bar" do.
    """
    rest = words[1:]
    if first:
        said = f" {' '.join(rest)} "
        bare = rest[-1:] == ["no"] or re.search(r" (?:but|or|and|is) (?:no|not|false) ", said)
        return bool(bare) or "not" in rest[:1]
    determiner = rest and rest[0] not in (
        "it",
        "there",
        "they",
        "the",
        "this",
        "that",
        "not",
        "its",
    )
    comma = rest and words[0] in ("no", "n") and determiner
    return bool({"yes", "true"} & set(rest)) or bool(comma)
