"""Every record that travels between stages: frozen dataclasses, one JSON form each.

Keys are readable and unique. A question is ``set:split:n``, a path
``<question>/r<round>/p<k>``, a pair ``<winner>|<loser>``, a prediction
``<question>@<entry>``. A record names its parents, and the model digest, prompt
version and seed that made it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self

AnswerType = Literal["number", "label", "choice", "yes_no", "list", "text"]
Finish = Literal["summary", "step_cap", "truncated"]


class RecordFormatError(ValueError):
    """A row does not have the fields of its record."""


@dataclass(frozen=True)
class Record:
    """Base of all records: to and from plain JSON values."""

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values (tuples become lists)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Builds the record from ``to_json``'s form.

        Raises:
            RecordFormatError: A field is missing or unknown.
        """
        hints = _hints(typing.cast(Any, cls))
        unknown = row.keys() - hints.keys()
        if unknown:
            raise RecordFormatError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}")
        try:
            return cls(**{name: _parse(hints[name], value) for name, value in row.items()})
        except TypeError as error:
            raise RecordFormatError(f"{cls.__name__}: {error}") from None


@dataclass(frozen=True)
class Question(Record):
    """A question about one or more pictures, with its true answer.

    Attributes:
        key: ``set:split:n``.
        text: What is asked, options included.
        pictures: Ids (SHA-256 of the file) in the picture store.
        answer: The true answer in canonical text; several, for a list, joined by ``", "``.
        answer_type: How answers are compared.
        options: For ``choice``: the texts of (A), (B), … in order.
        task: The kind of question, e.g. ``difference``.
        group: What may not be split and is resampled as one: the table behind a chart.
    """

    key: str
    text: str
    pictures: tuple[str, ...]
    answer: str
    answer_type: AnswerType
    options: tuple[str, ...] = ()
    task: str = ""
    group: str = ""

    @property
    def benchmark(self) -> str:
        """The question set's name, the first part of the key."""
        return self.key.split(":", 1)[0]


@dataclass(frozen=True)
class Step(Record):
    """One step of reasoning; its text form is one JSON object on one line."""

    title: str
    content: str
    next_action: Literal["continue", "summary"]


@dataclass(frozen=True)
class ReasoningPath(Record):
    """A chain of steps and the answer drawn from it.

    Attributes:
        key: ``<question>/r<round>/p<k>``.
        question: Key of the question.
        steps: The parsed steps, in order; never empty.
        answer: The final answer as the model gave it, stripped; empty if it gave none.
        finish: Why the steps ended.
        tokens: Tokens the model generated for it, retries included.
        attempts: Engine calls that were needed, retries included.
        model: Digest of the model.
        prompt: Version of the prompt set.
        seed: Seed of the path's first call.
    """

    key: str
    question: str
    steps: tuple[Step, ...]
    answer: str
    finish: Finish
    tokens: int
    attempts: int
    model: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class FailedPath(Record):
    """A path that came to nothing; it stands among the paths of its question (see ``paths``).

    Attributes:
        key: The key the path would have had.
        question: Key of the question.
        reason: Why it failed.
        text: What the model wrote last, its beginning.
    """

    key: str
    question: str
    reason: str
    text: str = ""


@dataclass(frozen=True)
class Verdict(Record):
    """Whether a path's answer is the true one. ``correct`` is None while undecided.

    Attributes:
        path: Key of the path.
        question: Key of the question.
        correct: True, False, or None when neither rules nor judge could tell.
        rule: What decided (``number``, ``choice-letter``, …, ``llm``, ``undecided``).
        detail: The judge's raw words, or why nothing could be decided.
        model: Digest of the judging model; empty when a rule decided.
    """

    path: str
    question: str
    correct: bool | None
    rule: str
    detail: str = ""
    model: str = ""


@dataclass(frozen=True)
class PathScore(Record):
    """Scores 1–100 of one path, given in one pass over all paths of its question.

    Attributes:
        path: Key of the path.
        question: Key of the question.
        logic: Does each step follow from those before it.
        grounding: Freedom from hallucinated details (100: all is in the picture).
        completeness: No step skipped.
        total: The overall score curation uses; None when the reply could not be parsed.
        bad_steps: 1-based numbers of the steps the scorer flags.
        position: Place at which the scorer saw the path (order is seeded).
        reason: Why it is unscored; empty otherwise.
        model: Digest of the scoring model.
        prompt: Version of the prompt set.
        seed: Seed of the call.
    """

    path: str
    question: str
    logic: int | None
    grounding: int | None
    completeness: int | None
    total: int | None
    bad_steps: tuple[int, ...] = ()
    position: int = 0
    reason: str = ""
    model: str = ""
    prompt: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Message(Record):
    """One turn of a chat. The pictures of a sample belong to its first user turn.

    Attributes:
        role: ``user`` or ``assistant``.
        text: The turn's text.
        train: For training samples: whether the loss covers this (assistant) turn.
    """

    role: Literal["user", "assistant"]
    text: str
    train: bool = False


@dataclass(frozen=True)
class TrainingSample(Record):
    """A chat to be learned.

    Attributes:
        key: Unique in its set.
        question: Key of the question it comes from.
        pictures: Picture ids, shown in the first user turn.
        messages: The turns; the loss covers those with ``train`` set.
        kind: Where it came from, e.g. ``reasoning:best``, ``summary:wrong``, ``plain``.
        parents: Keys of the records it was made from.
    """

    key: str
    question: str
    pictures: tuple[str, ...]
    messages: tuple[Message, ...]
    kind: str
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreferencePair(Record):
    """Two replies to one prompt, the first preferred.

    Attributes:
        key: ``<winner>|<loser>`` (keys of the paths).
        question: Key of the question.
        pictures: Picture ids, shown in the first user turn.
        prompt: The turns both replies answer.
        chosen: Text of the preferred assistant turn.
        rejected: Text of the other.
        kind: Why it is a pair: ``right>wrong`` or ``score``.
        gap: Score of the winner minus score of the loser, where both have one.
        reference_chosen: Summed log-probability (nats) of ``chosen`` under the reference
            model, once known.
        reference_rejected: The same for ``rejected``.
        reference_model: Digest of that model.
    """

    key: str
    question: str
    pictures: tuple[str, ...]
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    kind: str
    gap: int | None = None
    reference_chosen: float | None = None
    reference_rejected: float | None = None
    reference_model: str = ""


@dataclass(frozen=True)
class Prediction(Record):
    """One entry of the ladder answering one test question.

    Attributes:
        key: ``<question>@<entry>``.
        question: Key of the question.
        entry: Name of the ladder's entry.
        reasoning: The reasoning's text; empty if the entry wrote none.
        reasoning_answer: The answer the reasoning itself arrives at, if any.
        answer: The final answer.
        correct: Whether it is right; None if undecided.
        reasoning_correct: Whether ``reasoning_answer`` is right; None if there is none.
        rule: What decided ``correct``.
        tokens: Generated tokens in all.
        models: Digests of the models used, in order of use.
    """

    key: str
    question: str
    entry: str
    reasoning: str
    reasoning_answer: str
    answer: str
    correct: bool | None
    reasoning_correct: bool | None
    rule: str
    tokens: int
    models: tuple[str, ...]


def paths(rows: Iterable[Mapping[str, Any]]) -> list[ReasoningPath]:
    """The paths among the rows of a generation stage, which holds failed ones too."""
    return [ReasoningPath.from_json(row) for row in rows if "steps" in row]


def failed_paths(rows: Iterable[Mapping[str, Any]]) -> list[FailedPath]:
    """The failed paths among the rows of a generation stage."""
    return [FailedPath.from_json(row) for row in rows if "steps" not in row]


def seed_for(run_seed: int, *parts: str | int) -> int:
    """A 63-bit seed from SHA-256 of the run's seed and (stage, round, question, …)."""
    text = "\x1f".join(str(part) for part in (run_seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _parse(hint: Any, value: Any) -> Any:
    """Tuples and nested records back from JSON lists and objects."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _parse(args[0], value)
    if origin is tuple:
        return tuple(_parse(args[0], item) for item in value)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    return value
