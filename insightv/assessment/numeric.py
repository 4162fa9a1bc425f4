"""Numbers compared: tolerance, percentages and fractions, units; formulas by math-verify."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from insightv.assessment.decision import UNDECIDED, Decision, RuleConfig, is_formula, normal
from insightv.assessment.quantities import SUPERSCRIPTS, UNITS, Quantity, quantities, ratio, tidy
from insightv.records import Question

LATEX_SECONDS = 3
"""Time math-verify has for each of its steps."""
_SIGN = re.compile(r"=|≈|→|\b(?:therefore|thus|hence|so|equals)\b", re.I)
_VERB = re.compile(r"\s*(?:is|are|was|were)\b", re.I)
_RAISED = "".join(map(chr, SUPERSCRIPTS))
_SIGNS = {
    "π": "\\pi ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "≠": "\\ne ",
    "×": "\\times ",
    "·": "\\cdot ",
    "∞": "\\infty ",
    "∪": "\\cup ",
    "∈": "\\in ",
    "±": "\\pm ",
    "−": "-",
    "°": "^\\circ ",
}
_FORMULA = re.compile(r"\\(?:[dt]?frac|sqrt|pi|left|begin|cdot|times|log|sin|cos|infty)|[\^√π]")
_STRANGE = re.compile(r"\\(?![dt]?frac|times|cdot|text|circ|[%$,;! ])|[√π]")
_WORDS = re.compile(r"\b[A-Za-z]{2,}\b")
_NOTHING = re.compile(r"(?:none|nothing|nobody|no one|no|zero|nil)(?: of (?:the )?\w+)?")
_VAGUE = re.compile(r"\b(?:all|both|each|every|couple|pair|few|several|many|single|once|twice)\b")
_NONE = re.compile(r"\b(?:none|nothing|nobody|no|not|never|zero|nil|without)\b", re.I)
_FALL = re.compile(
    r"\b(?:f[ae]ll|fallen|falls|drop|declin|decreas|down|los[st]|lower|less|reduc|shr[aiu]nk"
    r"|negativ|below|minus)\w*",
    re.I,
)
_OUT_OF = re.compile(r"\s(?:out of|in|in every|of|of every)\s(?:the\s)?")
_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were)|\b(?:total|sum|difference|result|value|count|ratio)\b\W{0,4})"
    r"\s*(?:about|only|exactly|just|around)?\s*$",
    re.I,
)


def number(question: Question, text: str, config: RuleConfig) -> Decision:
    """The number a text concludes with; several, one of them right, are left open."""
    decision = _concludes(question, text, config)
    if decision.correct is False and (doubt := _doubt(question, text, config)):
        return Decision(None, UNDECIDED, doubt)
    return decision


def _concludes(question: Question, text: str, config: RuleConfig) -> Decision:
    truths = quantities(tidy(question.answer))
    if len(truths) != 1:
        return Decision(None, UNDECIDED, "the true answer is not one number")
    text = tidy(text)
    found = quantities(text)
    if not found:
        if _NOTHING.fullmatch(normal(text)):
            return Decision(truths[0].value == 0, "number")
        if _VAGUE.search(normal(text)):
            return Decision(None, UNDECIDED, "an amount without a number")
        if re.search(r"[√π^\\]", text):
            return Decision(None, UNDECIDED, "a formula")
        return Decision(False, "no-number")
    verdicts = [equal(question, truths[0], quantity, config) for quantity in found]
    chosen = _concluded(question, text, found, verdicts)
    values = {(found[i].value, found[i].percent, found[i].unit) for i in chosen}
    outcomes = {verdicts[i] for i in chosen}
    if len(outcomes) == 1 and (len(values) == 1 or outcomes == {False}):
        (correct,) = outcomes
        if correct is False and len(values) > 1:
            return Decision(False, "number", "several numbers, none of them right")
        if correct is not None:
            return Decision(correct, "number")
        return Decision(None, UNDECIDED, "the number can be read in two ways")
    if outcomes == {True}:
        return Decision(True, "number")
    return Decision(None, UNDECIDED, "names several numbers" if chosen else "gives only a limit")


def _doubt(question: Question, text: str, config: RuleConfig) -> str:
    """Why a text that does not give the true number may yet mean it; or nothing."""
    (truth,), text = quantities(tidy(question.answer)), tidy(text)
    found = quantities(text)
    if not found:
        if not truth.value and _NONE.search(text):
            return "nothing in words"
        digits = re.sub(r"\D", "", question.answer)
        within = digits and re.search(rf"[A-Za-z_]-?{digits}(?![\d.,]*\d)", text)
        return "the true number within a name" if within else ""
    other_sign = [replace(q, value=-q.value) for q in found]
    fall = _FALL.search(f"{question.text} {text}") or re.fullmatch(r"\([^-()]+\)", text.strip())
    if fall and any(equal(question, truth, q, config) for q in other_sign):
        return "a fall may be told without a sign"
    for one, two in zip(found, found[1:], strict=False):
        if _OUT_OF.fullmatch(text, one.end, two.start) and two.value:
            share = replace(one, value=one.value / two.value)
            if equal(question, truth, share, config):
                return "a share in words"
    if truth.unit and UNITS[truth.unit][0] == "time" and re.search(r"\d:\d\d\b", text):
        return "a length of time written as a clock shows it"
    return ""


def _concluded(
    question: Question, text: str, found: Sequence[Quantity], verdicts: Sequence[bool | None]
) -> list[int]:
    """Indices of the numbers a text may be said to conclude with.

    Signs and words of conclusion are taken at their word; a mere "is" and numbers repeated
    from the question may single out a right answer among others, never a wrong one.
    """
    usable = [i for i, q in enumerate(found) if not q.bound and not q.negated]
    usable = _after_sign(text, found, usable)
    asked = {q.value for q in quantities(tidy(question.text))}
    fresh = [i for i in usable if found[i].value not in asked]
    repeated = [i for i in usable if i not in fresh]
    if fresh and all(verdicts[i] is False for i in repeated):
        usable = fresh  # "in 2010 it is 12"
    if len({found[i].value for i in usable}) < 2:
        return usable
    told = [i for i in usable if _COPULA.search(_before(text, found[i]))]
    leads = any(_VERB.match(text, found[i].end) for i in usable if i + 1 not in told)
    if len(told) != 1 or leads or _continued(text, found, told[0]):
        return usable
    others = [i for i in usable if found[i].value != found[told[0]].value]
    if verdicts[told[0]] or all(verdicts[i] is False for i in others):
        return told
    return usable


def _after_sign(text: str, found: Sequence[Quantity], usable: list[int]) -> list[int]:
    """What follows the last sign or word of conclusion, if it is one number."""
    for marker in reversed(list(_SIGN.finditer(text))):
        after = [i for i in usable if found[i].start >= marker.end()]
        if after:
            # "12 = 5 + 7" concludes with either side.
            return after if len({found[i].value for i in after}) == 1 else usable
    return usable


def _before(text: str, quantity: Quantity) -> str:
    return text[max(0, quantity.start - 30) : quantity.start]


def _continued(text: str, found: Sequence[Quantity], index: int) -> bool:
    """Whether another number is offered beside this one (``12 or 13``)."""
    if index + 1 >= len(found):
        return False
    between = text[found[index].end : found[index + 1].start].lower().strip()
    return between in ("or", "and", ",", "/", "to", "-", ", or", ", and", "(or", "vs", "+")


def equal(question: Question, truth: Quantity, given: Quantity, config: RuleConfig) -> bool | None:
    """Whether two numbers are the same; None where the unit or the notation leaves doubt."""

    def close(one: float, two: float) -> bool:
        whole = float(one).is_integer()
        relative = config.integer_tolerance if whole else config.decimal_tolerance
        return abs(one - two) <= (relative + 1e-9) * abs(one)

    value, other = truth.value, given.value
    if truth.unit and given.unit:
        factor = ratio(truth.unit, given.unit)
        if factor is None:
            degrees = {UNITS[truth.unit][0], UNITS[given.unit][0]} == {"celsius", "fahrenheit"}
            return None if degrees or close(value, other) else False
        other *= factor
    asks = question.text.lower()
    asks_percent = ("percent" in asks or "%" in asks) and "percentage point" not in asks
    if close(value, other):
        clash = given.percent and not truth.percent and not asks_percent
        return None if clash else True
    if truth.percent != given.percent or asks_percent:
        if (truth.percent or asks_percent) and not given.percent and close(value, other * 100):
            return True
        share = given.percent or 0 < abs(value) <= 1
        if not truth.percent and share and close(value, other / 100):
            return True
    if given.scale != truth.scale and _in_units_of(asks, given.scale):
        if close(value, other / given.scale):
            return True
    elif given.scale != truth.scale and _in_units_of(asks, truth.scale):
        return close(value, other * truth.scale)
    elif any(_in_units_of(asks, s) and close(value * s, other) for s in _WRITTEN_OUT):
        return None  # "how many millions?" answered with all the digits
    return None if any(close(value, reading) for reading in given.others) else False


_WRITTEN_OUT = (1e3, 1e6, 1e9, 1e12)


def _in_units_of(asks: str, scale: float) -> bool:
    word = {1e3: "thousand", 1e6: "million", 1e9: "billion", 1e12: "trillion"}.get(scale)
    return word is not None and word in asks


def latex(question: Question, text: str, config: RuleConfig) -> Decision | None:
    """By math-verify, where LaTeX is involved and the package is there."""
    if question.answer_type not in ("number", "text"):
        return None
    is_text = question.answer_type == "text"
    involved = is_formula(question.answer) if is_text else _FORMULA.search(question.answer)
    if not involved and (is_text or not _FORMULA.search(text)):
        return None
    both = (question.answer, text)
    plain = all(len(quantities(tidy(said))) == 1 and not _STRANGE.search(said) for said in both)
    if question.answer_type == "number" and plain:
        return None
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException
    except ImportError:
        return Decision(None, UNDECIDED, "LaTeX; install math-verify to have it decided by rule")
    if threading.current_thread() is not threading.main_thread():
        # Its time limit is a signal, and without one "10^{10^{10}}" never ends.
        return Decision(None, UNDECIDED, "LaTeX outside the main thread")
    prose = len(_WORDS.findall(re.sub(r"\\[A-Za-z]+|\$[^$]*\$", " ", text))) > 1
    answer, text = _in_latex(question.answer.strip("$")), _in_latex(text)
    try:
        gold, given = (
            parse(said, parsing_timeout=LATEX_SECONDS, raise_on_error=True)
            for said in (f"${answer}$", text if prose else f"${text.strip('$')}$")
        )
        equal = verify(gold, given, timeout_seconds=LATEX_SECONDS, raise_on_error=True)
    except (Exception, TimeoutException) as error:  # what it could not finish proves nothing
        return Decision(None, UNDECIDED, f"LaTeX that math-verify gives up: {type(error).__name__}")
    if equal or _rounds(both, (gold, given), config):
        return Decision(True, "math-verify")
    if any(not parsed or isinstance(parsed[0], str) for parsed in (gold, given)):
        return Decision(None, UNDECIDED, "LaTeX that math-verify cannot parse")
    if any(q.unit or q.percent for q in quantities(tidy(question.answer))):
        return Decision(None, UNDECIDED, "LaTeX against a number with a unit")
    if prose or _kind(gold[0]) != _kind(given[0]):
        return Decision(None, UNDECIDED, "LaTeX in words, or of another form")
    return Decision(False, "math-verify")


def _rounds(said: tuple[str, str], parsed: tuple[Any, Any], config: RuleConfig) -> bool:
    """Whether one gives the decimals of the other, a formula: 3.46 for the root of 12."""
    if all(map(_FORMULA.search, said)):
        return False
    try:
        truth, given = (_value(*pair) for pair in zip(said, parsed, strict=True))
    except Exception:  # a set, a relation, several numbers, or nothing that ends
        return False
    tolerance = 0.0 if truth.is_integer() else config.decimal_tolerance
    return abs(truth - given) <= (tolerance + 1e-9) * abs(truth)


def _value(text: str, parsed: Sequence[Any]) -> float:
    from math_verify.utils import timeout

    if _FORMULA.search(text):
        return float(timeout(LATEX_SECONDS)(float)(parsed[0]))
    (found,) = quantities(tidy(text))
    if found.bound or found.negated or found.percent:
        raise ValueError(f"{text!r} is no value")
    return found.value


def _in_latex(text: str) -> str:
    """A formula with the signs of Unicode spelt as LaTeX, which is all math-verify reads."""
    text = re.sub(f"([{_RAISED}]+)", lambda m: "^{" + m[1].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])|√\s*\(([^()]*)\)", _root, text)
    text = re.sub(r"(?<![\\A-Za-z])pi\b", "π", text)
    return re.sub(f"[{''.join(_SIGNS)}]", lambda m: _SIGNS[m[0]], text)


def _root(match: re.Match[str]) -> str:
    return "\\sqrt{" + (match[1] or match[2]) + "}"


def _kind(expression: Any) -> str:
    """Sets, relations and values: one may say what another does in a form of its own."""
    if isinstance(expression, (tuple, list)):
        return "set"
    if getattr(expression, "is_Relational", False) or getattr(expression, "is_Boolean", False):
        return "relation"
    return "set" if hasattr(expression, "contains") else "value"
