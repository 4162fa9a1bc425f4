"""What rules share: the decision, its tolerances, and how texts are compared."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

UNDECIDED = "undecided"
NEGATION = re.compile(r"\b(?:not|never|nor|neither|no|or|either|than|instead|except|unlike|but)\b")
_FORMULA = re.compile(r"\\[A-Za-z]|[\^=≤≥≠±√∪∩∈∞]|^[\[(][^()\[\]]*,[^()\[\]]*[\])]$")
FILLER = frozenset(
    re.split(
        r"\s+",
        """a an the is are was were has have had be it its this that these those there here of in on
        at by for with to from i we so therefore thus hence answer final conclusion correct right
        which what who bar bars slice point line column chart picture image graph figure value
        values label labelled labeled named called and then follows order ordered sorted list
        option choice my one ones only just exactly about shown clearly must would""",
    )
)
"""Words that name nothing: around the true answer they do not make it another."""


@dataclass(frozen=True)
class Decision:
    """What became of one answer.

    Attributes:
        correct: None where nothing could be decided.
        rule: What decided: ``exact``, ``number``, ``choice-letter``, ``choice-text``,
            ``yes-no``, ``list``, ``label``, ``text``, ``code``, ``date``, ``math-verify``,
            ``empty``, ``refusal``, ``llm``, ``undecided``; ``no-number``
            and ``no-match`` when the answer holds nothing of the kind asked for.
        detail: Why, in a few words.
    """

    correct: bool | None
    rule: str
    detail: str = ""


@dataclass
class RuleConfig:
    """Tolerances.

    Attributes:
        integer_tolerance: Relative, where the true answer is a whole number. 0: a count that
            is one off is wrong, however large.
        decimal_tolerance: Relative, otherwise. 1 % forgives rounding to two or three digits;
            ChartQA's 5 % would let misread bars into the training sets.
        ordered_tasks: Tasks (the first word of ``Question.task``) whose lists must be in order;
            other lists are sets.
    """

    integer_tolerance: float = 0.0
    decimal_tolerance: float = 0.01
    ordered_tasks: list[str] = field(default_factory=lambda: ["order", "sort", "rank"])


def normal(text: str) -> str:
    """A text without case, accents, articles, punctuation and mark-up, for comparison."""
    text = unicodedata.normalize("NFKD", text).casefold().replace("&", " and ")
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = re.sub(r"['’`*\"“”]", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?<!\d)[.](?!\d)|(?<=\d)[.](?!\d)|(?<!^)[-–—_](?!\d)|(?<=\w)[-–—]", " ", text)
    text = re.sub(r"[^\w\s.+#%$€£/<>-]", " ", text)
    return re.sub(r"^(?:(?:the|an?) )+", "", " ".join(text.split()))


def is_formula(text: str) -> bool:
    """Whether signs that ``normal`` drops carry the meaning: relations, powers, intervals."""
    return _FORMULA.search(text.strip()) is not None


def same(left: str, right: str) -> bool:
    """Equal once normalised; formulas, and signs alone, are compared as they stand."""
    if is_formula(left) or is_formula(right):
        one, two = (re.sub(r"[\s$]", "", unicodedata.normalize("NFKC", t)) for t in (left, right))
        return one == two
    one, two = normal(left), normal(right)
    return one == two if one or two else left.strip() == right.strip()
