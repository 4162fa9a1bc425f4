"""Right or wrong by rule, by type of answer; what rules cannot tell stays undecided."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from insightv.assessment.choices import choice, yes_no
from insightv.assessment.dates import moment
from insightv.assessment.decision import UNDECIDED, Decision, RuleConfig, normal, same
from insightv.assessment.numeric import latex, number
from insightv.assessment.wording import label, listing, text_answer
from insightv.records import Question

__all__ = ["Decision", "RuleConfig", "decide", "normal", "stated"]

LONGEST = 4000
"""Answers longer than this many characters are left to the judge."""
_RULES: dict[str, Callable[[Question, str, RuleConfig], Decision]] = {
    "number": number,
    "choice": choice,
    "yes_no": yes_no,
    "list": listing,
    "label": label,
    "text": text_answer,
}
_DEFAULT = RuleConfig()
_MARKER = re.compile(
    r"\b(?:final answer|answer|conclusion)\b[\s:*]{0,4}(?:\bis\b)?[\s:*\"'`=]{0,4}", re.I
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_CORRECTION = re.compile(r"\b(?:wait|actually|correction|i mean|sorry|no longer)\b[,:]?", re.I)
_EXPLANATION = re.compile(r"(?<=\S)\s*\n\W*(?:explanation|reason|reasoning|note|because)\b", re.I)
_SEGMENT_END = re.compile(r"\n|[.!?](?=\s+\S)|\b(?:because|since)\b|;\s")
_REFUSAL = re.compile(
    r"\b(?:(?:can ?not|can't|could not|couldn't|unable to|impossible to|not possible to|don't|"
    r"do not|not able to) (?:be )?(?:say|tell|see|read|know|determined?|answer(?:ed)?|identify|"
    r"view|access|make out|provide|help|assist|find)|not enough information|insufficient|"
    r"no (?:answer|idea)|unanswerable|not (?:visible|shown|given|available|sure|provided|clear)|"
    r"unknown|n/a|as an ai)\b",
    re.I,
)
_COMMITTED = re.compile(r"\b(?:but|however|probably|likely|guess|estimate|so)\b", re.I)


def decide(question: Question, answer: str, config: RuleConfig = _DEFAULT) -> Decision:
    """Compares an answer with the question's true one.

    Args:
        question: Gives the true answer, its type, options and task.
        answer: As a model gave it: short, or a sentence, in any spelling.
        config: Tolerances.

    Returns:
        Right, wrong, or undecided: an answer that allows two readings, one of them right, and
        free text that differs from the truth are not rules' business.
    """
    text = _unwrap(answer)
    if text and same(text, question.answer):
        return Decision(True, "exact")
    if not re.search(r"\w", text):
        return Decision(False, "empty")
    if len(text) > LONGEST:
        return Decision(None, UNDECIDED, f"longer than {LONGEST} characters")
    refusal = _refusal(question, text)
    if refusal is not None:
        return refusal
    formula = latex(question, text, config)
    if formula is not None:
        return formula
    if question.answer_type in ("label", "text"):
        day = moment(question.answer, text)
        if day is not None:
            return day
    rule = _RULES[question.answer_type]
    decisions = [rule(question, part, config) for part in _conclusions(text)]
    if len({decision.correct for decision in decisions}) == 1:
        return decisions[-1]
    return Decision(None, UNDECIDED, "names several answers")


def stated(question: Question, text: str, config: RuleConfig = _DEFAULT) -> bool | None:
    """What a piece of reasoning concludes.

    Returns:
        True: it ends in the true answer; False: plainly in another one; None: it ends in
        nothing that the rules recognise as an answer.
    """
    decision = decide(question, text, config)
    if decision.correct is not False:
        return decision.correct
    plain = decision.rule in ("number", "choice-letter", "choice-text", "yes-no")
    return False if plain and not decision.detail else None


def _unwrap(answer: str) -> str:
    """The answer without a JSON object, a thinking block, fences or boxes around it."""
    text = re.sub(r"<(think|reasoning)>.*?</\1>", "", answer, flags=re.S).strip()
    text = re.sub(r"^```\w*\s*|\s*```$", "", text)
    if text.startswith("{") and text.endswith("}"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            inner = value.get("answer", value.get("final_answer"))
            if isinstance(inner, (str, int, float, list)):
                text = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
    text = re.sub(r"^\$(?!\s?\d[\d.,]*\s*\w*$)([^$]+)\$$", r"\1", text.strip())
    boxes = _BOXED.findall(text)
    return (boxes[-1] if boxes else text).strip()


def _conclusions(text: str) -> list[str]:
    """What follows ``answer is``, each time it does; the whole text if it never does."""
    if correction := list(_CORRECTION.finditer(text)):
        rest = text[correction[-1].end() :]
        if re.search(r"\w", rest) and correction[-1].start() > 0:
            text = rest
    text = _EXPLANATION.split(text, maxsplit=1)[0] or text
    parts = []
    for marker in _MARKER.finditer(text):
        part = _SEGMENT_END.split(text[marker.end() :].strip(), maxsplit=1)[0].strip(" :*\"'`")
        if re.search(r"\w", part):
            parts.append(part)
    return list(dict.fromkeys(parts))[-8:] or [text]


def _refusal(question: Question, text: str) -> Decision | None:
    match = _REFUSAL.search(text.replace("’", "'"))
    if not match or question.answer_type == "text" and len(text.split()) > 12:
        return None
    spoken = f" {normal(text)} "
    if any(f" {normal(option)} " in spoken for option in (*question.options, question.answer)):
        return None
    rest = text[match.end() :]
    if _MARKER.search(rest) or _COMMITTED.search(rest):
        return None
    return Decision(False, "refusal", match[0])
