"""The questions of a split from all sets that are read, without what evaluation asks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.config import shaping
from hpc.errors import UserError
from hpc.stages import Package
from insightv.demo.tables import INSTALL as INSTALL_DEMO
from insightv.demo.tables import PACKAGES
from insightv.questions.duplicates import Fingerprint, HeldOut
from insightv.questions.media import Nowhere, PictureSink
from insightv.questions.reading import Asked, Dropped, read_questions
from insightv.questions.sources import INSTALL
from insightv.records import Question

if TYPE_CHECKING:
    from insightv.config import ChainConfig, QuestionsSection

EASY_VQA = Package("easy-vqa", "easy_vqa", INSTALL_DEMO)
DUPLICATES = ("question", "picture", "keep")
DROPPED = "dropped.jsonl"
"""In the stage's folder: key, reason and detail of everything that became no question."""
_LATER = {"train": ("validation", "test"), "validation": ("test",), "test": ()}
"""What each split must not hold: questions of those that are evaluated on later."""


def packages_of(asked: QuestionsSection, split: str) -> tuple[Package, ...]:
    """What the questions of a split are read with, beside what every installation has."""
    found: list[Package] = []
    drawn = {name: getattr(getattr(asked, name), split) for name in ("charts", "reading", "shapes")}
    if drawn["charts"] or drawn["reading"]:
        found += PACKAGES
    if drawn["shapes"]:
        found.append(EASY_VQA)
    for mapping in (*asked.mappings, *asked.held_out_mappings):
        if not asked.place.of(mapping).is_dir():
            found.append(Package("datasets", "datasets", INSTALL))
        elif mapping.format == "parquet":
            found.append(Package("pyarrow", "pyarrow", INSTALL))
    return tuple(dict.fromkeys(found))


def make_read(
    config: ChainConfig,
    split: str,
    directory: Path,
    pictures: PictureSink,
    counts: Counter[str],
) -> Iterator[Question]:
    """Questions of a split from the sets that are read, set after set.

    Args:
        config: The chain's.
        split: ``train``, ``validation`` or ``test``.
        directory: The stage's folder, where `DROPPED` is written.
        pictures: Where pictures are stored.
        counts: What is left out, and how many pictures were made smaller, by reason.

    Raises:
        UserError: A set cannot be read, or more than ``error_limit`` of it is broken.
    """
    asked = config.questions
    if not asked.mappings:
        return
    held = held_out(asked, split, counts)
    with (directory / DROPPED).open("w", encoding="utf-8") as told:
        for mapping in asked.mappings:
            most = asked.most(mapping, split)
            if most == 0:
                continue
            broken: Counter[str] = Counter()
            seed = config.seed if split == "train" else asked.held_out_seed
            filter_ = _Unheld(held, asked.duplicates, counts)
            made = 0
            for found in read_questions(
                mapping, split, asked.place, pictures, most or 0, seed, filter_
            ):
                if isinstance(found, Asked):
                    made += 1
                    counts["pictures made smaller"] += found.shrunk
                    yield found.question
                    continue
                counts[f"dropped: {mapping.name}: {found.reason}"] += 1
                broken[found.reason] += found.broken
                told.write(json.dumps(_row(found), ensure_ascii=False) + "\n")
            if broken.total() > config.error_limit * (made + broken.total()):
                raise UserError(
                    f"{mapping.name}: {broken.total()} of {made + broken.total()} questions of "
                    f"{split} are broken ({told_of(broken)}); see {directory / DROPPED}, then mend "
                    "the set or raise error_limit"
                )
    counts += Counter()  # without zeros


def held_out(asked: QuestionsSection, split: str, counts: Counter[str]) -> HeldOut:
    """What a split must not hold: the later splits of every set, and further evaluation sets.

    Whole splits are held out, also where only a part of them is evaluated on.
    """
    held = HeldOut()
    if asked.duplicates == "keep" or not _LATER[split]:
        return held
    wanted = [(mapping, later) for mapping in asked.mappings for later in _LATER[split]]
    wanted += [(mapping, each) for mapping in asked.held_out_mappings for each in mapping.splits]
    for mapping, later in wanted:
        for found in read_questions(mapping, later, asked.place, Nowhere()):
            if isinstance(found, Asked):
                held.add(found.question.key, found.text, found.pictures)
            else:
                counts[f"not held out: {mapping.name}: {found.reason}"] += 1
    counts["held out: questions looked for"] += len(held)
    return held


def shape(asked: QuestionsSection, split: str) -> dict[str, Any]:
    """What makes a split's questions, of the part of the configuration that reads sets."""
    later = _LATER[split] if asked.duplicates != "keep" else ()
    plain = shaping(asked)
    read = []
    for mapping in plain["mappings"]:
        kept = {name: s for name, s in mapping["splits"].items() if name in (split, *later)}
        # Shares of one file depend on each other.
        shares = {name: s["share"] for name, s in mapping["splits"].items()}
        read.append(mapping | {"splits": kept, "shares": shares})
    made = {
        "sets": read,
        "take": {name: sizes[split] for name, sizes in plain["take"].items()},
    }
    if later:
        made |= {"held out": plain["held_out_mappings"], "duplicates": asked.duplicates}
    return made


def told_of(counts: Counter[str]) -> str:
    """The commonest reasons, in words."""
    reasons = Counter({name.removeprefix("dropped: "): n for name, n in counts.items() if n})
    return "; ".join(f"{name}: {n:,}" for name, n in reasons.most_common(4))


class _Unheld:
    """Refuses questions that evaluation asks too; counts those it only might."""

    def __init__(self, held: HeldOut, duplicates: str, counts: Counter[str]):
        self.held, self.duplicates, self.counts = held, duplicates, counts

    def __call__(self, text: str, pictures: tuple[Fingerprint, ...]) -> Dropped | None:
        if not len(self.held):
            return None
        if other := self.held.same_question(text, pictures):
            return Dropped("", "duplicate: evaluation asks it too", f"as {other}")
        if other := self.held.same_picture(pictures):
            if self.duplicates == "picture":
                return Dropped("", "duplicate: evaluation shows its picture", f"as {other}")
            self.counts["kept, though evaluation shows the picture"] += 1
        return None


def _row(found: Dropped) -> dict[str, Any]:
    detail = {"detail": found.detail} if found.detail not in ("", found.reason) else {}
    return {"key": found.key, "reason": found.reason, **detail, "broken": found.broken}
