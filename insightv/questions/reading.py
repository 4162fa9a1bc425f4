"""Rows of a set made into questions; what cannot be one is handed on with its reason."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hpc.errors import RecordError
from hpc.stages import Row
from insightv.assessment.decision import normal
from insightv.questions.duplicates import Fingerprint
from insightv.questions.mapping import SetConfig
from insightv.questions.media import PictureSink, Sides, encoded, prepare
from insightv.questions.sources import Place, count, field, rows
from insightv.questions.texts import LETTERS, as_options, as_text, kind_of, options_of, placed
from insightv.records import AnswerType, Question, seed_for

__all__ = ["Asked", "Dropped", "Place", "count_questions", "read_questions"]

_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LETTERED = re.compile(r"\(?([A-Z])[.):]")  # not "A dog"
REMEMBERED = 4096
"""Pictures that are not looked at again when the next rows show them too."""


_Fields = tuple[str, tuple[str, ...], str, AnswerType]
"""Text, options, answer and its type."""


@dataclass(frozen=True)
class Asked:
    """A question that was made.

    Attributes:
        question: The record; its pictures are stored.
        text: What is asked, without options, context and literals that the mapping removes.
        pictures: What its pictures are recognised by.
        shrunk: How many of them were made smaller.
    """

    question: Question
    text: str
    pictures: tuple[Fingerprint, ...]
    shrunk: int = 0


@dataclass(frozen=True)
class Dropped:
    """A question, or a row, that was not made.

    Attributes:
        key: That it would have had.
        reason: Why, in words that are the same for all of a kind.
        detail: The particulars.
        broken: Whether something is wrong with the data, and not merely unsuited.
    """

    key: str
    reason: str
    detail: str = ""
    broken: bool = False


class _Unsuited(Exception):
    """A row that is sound and yet no question for this project."""


@dataclass(frozen=True)
class _Posed:
    """Question and answer as the row has them."""

    text: str
    answer: Any
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Shown:
    """A row's pictures, stored."""

    ids: tuple[str, ...]
    fingerprints: tuple[Fingerprint, ...]
    shrunk: int


def read_questions(
    mapping: SetConfig,
    split: str,
    place: Place,
    pictures: PictureSink,
    size: int = 0,
    seed: int = 0,
    wanted: Callable[[str, tuple[Fingerprint, ...]], Dropped | None] | None = None,
) -> Iterator[Asked | Dropped]:
    """The questions of a split, in the order of its rows.

    Memory is bounded by one row, of Parquet by a row group, which `datasets` writes with 100
    rows.

    Args:
        mapping: The set.
        split: One of its splits; a set without it has no questions.
        place: Where sets are found.
        pictures: Where pictures are stored.
        size: Most questions, drawn over all rows; 0: every one.
        seed: Draws them.
        wanted: Looks at a question's text and pictures before anything is stored; what it
            returns is dropped.

    Raises:
        UserError: See `rows`.
    """
    if split not in mapping.splits:
        return
    reader = _Reader(mapping, split, place, pictures, wanted)
    low, high = mapping.interval(split)
    draw = _Draw(size, seed, mapping.name, split, count(mapping, split, place), high - low)
    for number, row in enumerate(rows(mapping, split, place)):
        if draw.over:
            return
        if not draw.takes(number):
            continue
        made = 0
        for found in reader.questions(number, row, (low, high)):
            made += isinstance(found, Asked)
            yield found
            if size and made + draw.got >= size:
                break
        draw.note(made)


def count_questions(mapping: SetConfig, split: str, place: Place) -> int:
    """About how many questions a split has: its rows, by its share; 0 where nobody can tell."""
    if split not in mapping.splits:
        return 0
    total = count(mapping, split, place) or 0
    return round(total * mapping.splits[split].share)


class _Draw:
    """Which rows to read, so that ``size`` questions come from all over the set.

    Each row is taken with the chance that is left: questions still wanted over rows still to
    come (Knuth's algorithm S), so what is dropped on the way is made up for.
    """

    def __init__(
        self, size: int, seed: int, name: str, split: str, total: int | None, share: float
    ):
        self.size, self.total, self.share, self.got = size, total, share, 0
        self._seed = (seed, "take", name, split)
        self._read = self._made = 0

    @property
    def over(self) -> bool:
        return bool(self.size) and self.got >= self.size

    def takes(self, number: int) -> bool:
        if not self.size or self.total is None:
            return True
        # A row gives so many questions: more than one in conversations, less where a hash
        # gives part of them to another split.
        gives = (self._made + 1) / (self._read + 1) if self._read else self.share
        wanted = math.ceil((self.size - self.got) / max(gives, 1e-6))
        return seed_for(*self._seed, number) / 2**63 < wanted / max(self.total - number, 1)

    def note(self, made: int) -> None:
        self.got += made
        self._made += made
        self._read += 1


class _Reader:
    """Makes the questions of a row."""

    def __init__(
        self,
        mapping: SetConfig,
        split: str,
        place: Place,
        pictures: PictureSink,
        wanted: Callable[[str, tuple[Fingerprint, ...]], Dropped | None] | None,
    ):
        self.mapping, self.split, self.pictures, self.wanted = mapping, split, pictures, wanted
        here = place.of(mapping)
        self.folder = here / mapping.picture_folder if here.is_dir() else None
        self.sides = Sides(mapping.shortest_side, mapping.longest_side)
        # What the last pictures became: sets ask several questions about one, in a row.
        self._known: dict[str, tuple[str, Fingerprint, bool] | str] = {}

    def questions(
        self, number: int, row: Row | RecordError, part: tuple[float, float]
    ) -> Iterator[Asked | Dropped]:
        """Everything a row asks; nothing where its hash gives it to another split."""
        key = f"{self.mapping.name}:{self.split}:{number}"
        while len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        try:
            if isinstance(row, RecordError):
                raise row
            data = self._encoded(row)
            if part != (0.0, 1.0) and not part[0] <= _hashed(data, number) < part[1]:
                return
            posed = self._posed(row)
        except _Unsuited as why:
            yield _dropped(key, str(why))
            return
        except RecordError as error:
            yield _dropped(key, str(error), broken=True)
            return
        shown: _Shown | None = None
        for place, one in enumerate(posed):
            mine = key if len(posed) == 1 else f"{key}.{place}"
            try:
                bare, fields = self._fields(row, one)
                shown = shown or self._prepared(data)
                refused = self.wanted(bare, shown.fingerprints) if self.wanted else None
                if refused is not None:
                    yield Dropped(mine, refused.reason, refused.detail, refused.broken)
                    continue
                yield self._asked(mine, row, bare, fields, self._stored(shown, data))
            except _Unsuited as why:
                yield _dropped(mine, str(why))
            except RecordError as error:
                yield _dropped(mine, str(error), broken=True)

    # ---- text

    def _posed(self, row: Row) -> list[_Posed]:
        mapping, turns = self.mapping, self.mapping.turns
        if not turns.column:
            options = as_options(field(row, mapping.options)) if mapping.options else ()
            question, answer = field(row, mapping.question), field(row, mapping.answer)
            return [_Posed(as_text(question), answer, options)]
        said = field(row, turns.column)
        if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
            raise RecordError(f"row: {turns.column} holds no turns")
        if turns.question:
            pairs = [(turn.get(turns.question), turn.get(turns.answer)) for turn in said]
        else:
            pairs = [
                (one.get(turns.text), two.get(turns.text))
                for one, two in zip(said, said[1:], strict=False)
                if (one.get(turns.role), two.get(turns.role)) == (turns.asks, turns.answers)
            ]
        if not pairs:
            raise RecordError(f"row: {turns.column} holds no question with an answer")
        return [_Posed(as_text(q), a) for q, a in pairs[: turns.most or None]]

    def _fields(self, row: Row, posed: _Posed) -> tuple[str, _Fields]:
        """What is asked, bare of all else; and text, options, answer and its type.

        Raises:
            RecordError: Something is missing, or the answer is none of the options.
        """
        mapping, text, options = self.mapping, posed.text, posed.options
        for literal in mapping.remove:
            text = text.replace(literal, "")
        if mapping.options_in_question and not options:
            text, options = options_of(text)
        text, bare = text.strip(), placed(text, 1)
        if not bare:
            raise RecordError("question: empty")
        context = [as_text(field(row, name)).strip() for name in mapping.context]
        text = "\n".join([*filter(None, context), text])
        if len(options) > len(LETTERS):
            raise _Unsuited(f"question: more than {len(LETTERS)} options")
        answer, several = self._answer(posed.answer)
        if not answer:
            raise _Unsuited("answer: none (as in test splits whose answers are kept back)")
        kind = mapping.answer_type
        if kind == "auto":
            kind = (
                "choice" if options else "list" if several else kind_of(answer, mapping.otherwise)
            )
        if kind == "choice":
            answer = self._letter(answer, options)
            lines = (f"({mark}) {option}" for mark, option in zip(LETTERS, options, strict=False))
            text = "\n".join([text, *lines])
        if kind == "yes_no":
            answer = {"true": "yes", "false": "no"}.get(normal(answer), normal(answer))
            if answer not in ("yes", "no"):
                raise RecordError("answer: neither yes nor no")
        options = options if kind == "choice" else ()
        return bare, (text, options, answer, kind)  # type: ignore[return-value]

    def _answer(self, value: Any) -> tuple[str, bool]:
        """The answer's text, and whether it is several."""
        mapping = self.mapping
        if isinstance(value, (list, tuple)):
            said = [text for item in value if (text := self._clean(as_text(item)))]
            if mapping.several == "list":
                return ", ".join(said), len(said) > 1
            if mapping.several == "commonest":
                same = Counter(map(normal, said))
                return max(said, key=lambda text: same[normal(text)], default=""), False
            return (said[0] if said else ""), False
        return self._clean(as_text(value)), False

    def _clean(self, text: str) -> str:
        text = text.strip()
        for literal in self.mapping.remove_answer:
            text = text.removeprefix(literal).removesuffix(literal).strip()
        return text

    def _letter(self, answer: str, options: tuple[str, ...]) -> str:
        """The letter of the true option.

        Raises:
            RecordError: It is none of them.
        """
        known, form = LETTERS[: len(options)], self.mapping.answer_is
        if form.startswith("index"):
            number = int(answer) if re.fullmatch(r"[0-9]{1,3}", answer) else -1
            place = number - (form == "index_from_one")
            if 0 <= place < len(known):
                return known[place]
        named = _LETTER.fullmatch(answer) if form == "letter" else None
        if named and named[1].upper() in known:
            return named[1].upper()
        same = [mark for mark, text in zip(known, options, strict=True) if text == answer]
        same = same or [
            mark
            for mark, text in zip(known, options, strict=True)
            if normal(text) and normal(text) == normal(answer)
        ]
        if form in ("text", "letter") and len(same) == 1:
            return same[0]
        named = _LETTERED.match(answer) if form == "letter" else None
        if named and named[1] in known:
            return named[1]
        raise RecordError("answer: none of the options, or several")

    # ---- pictures

    def _encoded(self, row: Row) -> list[bytes]:
        """The row's pictures, encoded, each once.

        Raises:
            RecordError: A file is missing or leads elsewhere.
        """
        columns = [field(row, name) for name in self.mapping.pictures]
        found = list(encoded(columns, self.folder))
        if not found and not self.mapping.text_only:
            raise _Unsuited("picture: none")
        if len(found) > self.mapping.most_pictures:
            raise _Unsuited(f"picture: more than {self.mapping.most_pictures} of them")
        return found

    def _prepared(self, data: list[bytes]) -> _Shown:
        """Looks at pictures; nothing is stored yet."""
        ids, marks, shrunk = [], [], 0
        for one in data:
            digest = hashlib.sha256(one).hexdigest()
            if digest not in self._known:
                try:
                    ready = prepare(one, self.sides)
                except RecordError as error:
                    self._known[digest] = str(error)
                else:
                    self._known[digest] = ("", ready.fingerprint, ready.shrunk)
            known = self._known[digest]
            if isinstance(known, str):
                raise RecordError(known)
            ids.append(digest)
            marks.append(known[1])
            shrunk += known[2]
        return _Shown(tuple(ids), tuple(marks), shrunk)

    def _stored(self, shown: _Shown, data: list[bytes]) -> _Shown:
        """Stores what was looked at, each picture once."""
        ids = []
        for digest, one in zip(shown.ids, data, strict=True):
            known = self._known[digest]
            assert not isinstance(known, str)
            stored, mark, shrunk = known
            if not stored:
                stored = self.pictures.add(prepare(one, self.sides).data if shrunk else one)
                self._known[digest] = (stored, mark, shrunk)
            ids.append(stored)
        return _Shown(tuple(ids), shown.fingerprints, shown.shrunk)

    def _asked(
        self,
        key: str,
        row: Row,
        bare: str,
        fields: _Fields,
        shown: _Shown,
    ) -> Asked:
        mapping = self.mapping
        text, options, answer, kind = fields
        task = field(row, mapping.task) if mapping.task else ""
        task = ", ".join(map(as_text, task if isinstance(task, list) else [task]))
        group = as_text(field(row, mapping.group)) if mapping.group else ""
        group = group or (shown.fingerprints[0].digest[:16] if shown.ids else key)
        question = Question(
            key=key,
            text=placed(text, len(shown.ids)),
            pictures=shown.ids,
            answer=answer,
            answer_type=kind,
            options=options,
            task=mapping.task_names.get(task, task),
            group=f"{mapping.name}/{group}",
        )
        return Asked(question, bare, shown.fingerprints, shown.shrunk)


def _dropped(key: str, reason: str, broken: bool = False) -> Dropped:
    """Cuts a reason where its particulars begin, so that reasons can be counted."""
    kind = re.sub(r"(?<!\w)'[^']*'|\b[0-9a-f]{12}\b|\d[\d,]*", "…", reason).split(" (")[0]
    return Dropped(key, kind[:80], reason[:500], broken)


def _hashed(data: list[bytes], number: int) -> float:
    """A number from 0 to 1 that is the same for all rows with this first picture."""
    mark = hashlib.sha256(data[0]).digest() if data else str(number).encode()
    return int.from_bytes(hashlib.sha256(b"split" + mark).digest()[:8], "big") / 2**64
