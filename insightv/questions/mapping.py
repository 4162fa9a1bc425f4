"""What a question set is: where its rows stand, and which columns make a question.

A mapping is YAML over `SetConfig` (``configs/data/`` has those of public sets). It only names
columns and chooses among the readings below; nothing in it is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc.config import load
from hpc.errors import UserError

SPLITS = ("train", "validation", "test")
FORMATS = ("parquet", "jsonl", "json", "webdataset")
ANSWER_TYPES = ("number", "label", "choice", "yes_no", "list", "text")
ANSWER_FORMS = ("text", "letter", "index", "index_from_one")
SEVERAL = ("first", "commonest", "list")
DRAWN = ("charts", "reading", "shapes")
"""Names of the sets that are drawn, not read."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass
class SplitConfig:
    """Where the rows of one split stand.

    Attributes:
        files: Patterns of files in the set's folder, ``data/train-*.parquet``; read in the
            order of their names.
        split: The split's name on the hub, for sets that are read from there.
        share: Of these rows. Splits that read the same rows part them: by a hash of the first
            picture, so that no picture is asked about in two of them.
        digest: Filled in when a run starts: of the files.
    """

    files: list[str] = field(default_factory=list)
    split: str = ""
    share: float = 1.0
    digest: str = ""


@dataclass
class TurnsConfig:
    """Rows that hold a conversation: each question with the answer behind it is one.

    Attributes:
        column: That holds the turns; empty: a row is one question.
        question: Key of the question in a turn that has both (The Cauldron: ``user``).
        answer: Key of its answer (``assistant``).
        role: Else, key that says who speaks (LLaVA: ``from``).
        text: Key of what is said (``value``).
        asks: The role that asks.
        answers: The role that answers.
        most: Questions taken from a row; 0: all.
    """

    column: str = ""
    question: str = ""
    answer: str = ""
    role: str = ""
    text: str = ""
    asks: str = "human"
    answers: str = "gpt"
    most: int = 0


@dataclass
class SetConfig:
    """A question set.

    A column is named as in the data; ``json.answer`` is the key ``answer`` inside the column
    ``json``.

    Attributes:
        name: Of the set in this project: the first part of its questions' keys.
        hub: Its repository on the hub.
        subset: Its configuration there.
        revision: Its commit there; demanded where it is read from the hub.
        path: Its folder; a relative one lies in ``questions.folder``.
        format: Of the files: one of `FORMATS`. ``json`` is one array, held in memory whole.
        splits: Of `SPLITS`; those it lacks are empty.
        question: Column of what is asked.
        context: Columns put before it where they say something (a hint).
        answer: Column of the true answer.
        several: Where that holds a list: its ``first``, the ``commonest``, or all as a
            ``list``.
        options: Column of the options' texts, as a list or written as one.
        options_in_question: The question's text ends in lines ``A. …``; they are the options.
        answer_is: How the answer names an option: by ``text``, ``letter``, or ``index``
            (from 0, or ``index_from_one``).
        answer_type: One of `ANSWER_TYPES`, or ``auto``: ``choice`` where there are options,
            ``yes_no`` and ``number`` where the answer is one.
        otherwise: What ``auto`` takes else. ``label`` is for names from the picture: another
            name is wrong by rule. Where synonyms are right, ``text``.
        pictures: Columns of pictures, as encoded bytes or names of files; one column may hold
            several, and those a row lacks are passed over.
        picture_folder: Where named files lie, in the set's folder.
        most_pictures: Rows with more are left out.
        longest_side: Larger pictures are made smaller, to so many pixels. 4,096: more than
            the processors of today's models look at.
        shortest_side: Smaller ones are left out: less than a patch of any vision tower.
        text_only: Rows without a picture are taken too.
        turns: For rows that hold conversations.
        remove: Texts taken out of questions (a demand for a form of answer).
        remove_answer: Texts taken off answers, at either end.
        task: Column of the kind of question.
        task_names: Names of its values (class labels).
        group: Column of what may not be split and is resampled as one; empty: the picture.
    """

    name: str = ""
    hub: str = ""
    subset: str = ""
    revision: str = ""
    path: str = ""
    format: str = "parquet"
    splits: dict[str, SplitConfig] = field(default_factory=dict)
    question: str = "question"
    context: list[str] = field(default_factory=list)
    answer: str = "answer"
    several: str = "first"
    options: str = ""
    options_in_question: bool = False
    answer_is: str = "text"
    answer_type: str = "auto"
    otherwise: str = "text"
    pictures: list[str] = field(default_factory=lambda: ["image"])
    picture_folder: str = ""
    most_pictures: int = 8
    longest_side: int = 4096
    shortest_side: int = 8
    text_only: bool = False
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    remove: list[str] = field(default_factory=list)
    remove_answer: list[str] = field(default_factory=list)
    task: str = ""
    task_names: dict[str, str] = field(default_factory=dict)
    group: str = ""

    @property
    def columns(self) -> list[str]:
        """Every column it names, without repeats."""
        asked = [self.turns.column] if self.turns.column else [self.question, self.answer]
        named = [*asked, *self.context, self.options, *self.pictures, self.task, self.group]
        return list(dict.fromkeys(name for name in named if name))

    def validate(self, where: str) -> None:
        """Checks what types cannot.

        Args:
            where: What is named in errors: the file.

        Raises:
            UserError: A value that cannot work; the line names it.
        """
        where = f"{where}: {self.name or 'a set'}"
        if not _NAME.fullmatch(self.name) or self.name in DRAWN:
            raise UserError(
                f"{where}: name is {self.name!r}; give letters, digits, _ and -, and none of "
                f"{', '.join(DRAWN)}"
            )
        for key, value, known in (
            ("format", self.format, FORMATS),
            ("several", self.several, SEVERAL),
            ("answer_is", self.answer_is, ANSWER_FORMS),
            ("answer_type", self.answer_type, ("auto", *ANSWER_TYPES)),
            ("otherwise", self.otherwise, ANSWER_TYPES),
        ):
            if value not in known:
                raise UserError(f"{where}: {key} is {value!r}; use {', '.join(known)}")
        if not self.splits:
            raise UserError(f"{where}: has no splits; name its files or its splits on the hub")
        for name, split in self.splits.items():
            if name not in SPLITS:
                raise UserError(f"{where}: no split {name!r}; use {', '.join(SPLITS)}")
            if not split.files and not split.split:
                raise UserError(f"{where}: splits.{name} names neither files nor a split")
            if not 0 < split.share <= 1:
                raise UserError(f"{where}: splits.{name}.share is {split.share}; give up to 1")
            if self.interval(name)[1] > 1 + 1e-9:
                raise UserError(f"{where}: the shares of the same rows are more than 1 together")
            for pattern in split.files:
                _inside(where, f"splits.{name}.files", pattern)
        _inside(where, "picture_folder", self.picture_folder)
        if not self.pictures and not self.text_only:
            raise UserError(f"{where}: names no column of pictures; give one, or text_only: true")
        if min(self.most_pictures, self.longest_side, self.shortest_side) < 1:
            raise UserError(f"{where}: most_pictures and sides of pictures are 1 or more")
        if self.turns.most < 0:
            raise UserError(f"{where}: turns.most is {self.turns.most}; give 0 (all) or more")
        self._validate_turns(where)

    def _validate_turns(self, where: str) -> None:
        turns = self.turns
        if not turns.column:
            if not self.question or not self.answer:
                raise UserError(f"{where}: name the columns question and answer, or turns.column")
            return
        paired, spoken = turns.question and turns.answer, turns.role and turns.text
        if bool(paired) == bool(spoken):
            raise UserError(f"{where}: turns need either question and answer, or role and text")

    def interval(self, split: str) -> tuple[float, float]:
        """The part of the hash's range, 0 to 1, that belongs to a split."""
        mine, low = self.splits[split], 0.0
        for name in SPLITS:
            other = self.splits.get(name)
            if name == split or other is None:
                if name == split:
                    return low, low + mine.share
                continue
            if (other.files, other.split) == (mine.files, mine.split):
                low += other.share
        return low, low + mine.share


def load_set(path: Path, overrides: Sequence[str] = ()) -> SetConfig:
    """Reads and checks a mapping.

    Raises:
        UserError: An unreadable file, an unknown key (the nearest is named), an impossible
            value.
    """
    mapping = load(SetConfig, path, overrides)
    mapping.validate(str(path))
    return mapping


def _inside(where: str, key: str, name: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{where}: {key} is {name!r}; it lies in the set's folder, without ..")
