"""A sample of paths for the page: whole questions, drawn by hash, with their pictures.

One streaming pass a round keeps only the sample, so a round of any size can be shown.
The draw depends on the questions' keys alone: a question that several rounds answered is
shown for each of them.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from hpc import shards
from hpc.errors import RecordError
from hpc.stages import Row
from insightv.assessment.scoring import RETEST
from insightv.evaluation.funnel import (
    complete,
    outcome,
    round_name,
    rounds,
    shard_folder,
    stage_names,
)
from insightv.pictures import Pictures
from insightv.records import Question

PATHS = 300
"""Paths on a page: with their pictures some megabytes."""

_UNDECIDED = 4
_SIDE = 384
_SMALL = 160

Groups = list[tuple[str, dict[str, list[Row]]]]


def gallery(run: Path, most: int = PATHS) -> dict[str, Any]:
    """The sampled paths of every round with their questions and pictures, as JSON values.

    Args:
        run: The run directory.
        most: About how many paths to show, all rounds together.

    Returns:
        ``{"paths": [...], "questions": [...], "pictures": [data URI], "total": n}``; paths refer
        to questions, and questions to pictures, by position.
    """
    prefixes = rounds(run)
    paths: list[dict[str, Any]] = []
    total = 0
    for prefix in prefixes:
        groups, count = _sample(run, prefix, most // len(prefixes))
        total += count
        for _, rows in groups:
            paths += _paths(rows, prefix)
    uses = _uses(run, {path["key"] for path in paths})
    for path in paths:
        path["used"] = uses.get(path["key"], [])
    found = questions(run, "questions-train", {path["question"] for path in paths})
    paths = [path for path in paths if path["question"] in found]
    place = {key: number for number, key in enumerate(found)}
    for path in paths:
        path["question"] = place[path["question"]]
    stored, images = store(run), Images()
    shown = [
        {
            "key": question.key,
            "text": question.text,
            "truth": question.answer,
            "task": question.task,
            "pictures": [images.place(stored, picture) for picture in question.pictures],
        }
        for question in found.values()
    ]
    return {"paths": paths, "questions": shown, "pictures": images.uris, "total": total}


def store(run: Path) -> Pictures:
    """Every picture pack of a run."""
    return Pictures(sorted({*run.glob("stages/*/pictures"), *run.glob("pictures")}))


def questions(run: Path, stage: str, keys: set[str]) -> dict[str, Question]:
    """The questions of these keys, in the order of the stage; empty while it is incomplete."""
    if not keys or not complete(run, stage):
        return {}
    rows = shards.read_rows(shard_folder(run, stage))
    return {row["key"]: Question.from_json(row) for row in rows if row["key"] in keys}


class Images:
    """Pictures as data URIs, each once.

    Attributes:
        uris: The pictures so far; empty text for one that cannot be read.
    """

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, stored: Pictures, picture: str) -> int:
        """Position of a picture in ``uris``."""
        if picture not in self._places:
            self._places[picture] = len(self.uris)
            self.uris.append(data_uri(stored, picture))
        return self._places[picture]


def data_uri(stored: Pictures, picture: str) -> str:
    """A picture, decoded and encoded again (nothing of its file is passed on), at most 384 px.

    Returns:
        A ``data:image/webp`` URI; empty if the picture is missing or broken.
    """
    try:
        image = stored.image(picture)
    except RecordError:
        return ""
    small = max(image.size) <= _SMALL
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=small, quality=86)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def rank(key: str) -> str:
    """A question's place in the draw."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _sample(run: Path, prefix: str, most: int) -> tuple[Groups, int]:
    """Questions of the lowest hashes up to ``most`` paths, some undecided ones, and the count."""
    roles = {"paths": "generate", "verdicts": "judge", "scores": "score"}
    folders = {
        role: shard_folder(run, f"{prefix}-{stage}")
        for role, stage in roles.items()
        if complete(run, f"{prefix}-{stage}")
    }
    lowest, undecided, total = _Lowest(most), _Lowest(_UNDECIDED), 0
    for key, rows in shards.join(folders):
        # A path that failed has no steps to show; the funnel counts it.
        rows["paths"] = [path for path in rows["paths"] if "steps" in path]
        if not rows["paths"]:
            continue
        total += len(rows["paths"])
        lowest.add(key, rows)
        if any(row["correct"] is None for row in rows.get("verdicts", ())):
            undecided.add(key, rows)
    chosen: dict[str, dict[str, list[Row]]] = {}
    shown = 0
    for key, rows in lowest:
        if chosen and shown + len(rows["paths"]) > most:
            break
        chosen[key] = rows
        shown += len(rows["paths"])
    return list((chosen | dict(undecided)).items()), total


class _Lowest:
    """The ``most`` questions of the lowest hashes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[int, str, dict[str, list[Row]]]] = []

    def add(self, key: str, rows: dict[str, list[Row]]) -> None:
        """Keeps a question, or lets go of the highest; keys are unique, so rows never compare."""
        push = heapq.heappush if len(self._heap) < self._most else heapq.heappushpop
        push(self._heap, (-int(rank(key), 16), key, rows))

    def __iter__(self) -> Iterator[tuple[str, dict[str, list[Row]]]]:
        return ((key, rows) for _, key, rows in sorted(self._heap, key=lambda item: -item[0]))


def _paths(rows: Mapping[str, list[Row]], prefix: str) -> Iterator[dict[str, Any]]:
    """One question's paths with their verdicts and scores."""
    verdicts = {row["path"]: row for row in rows.get("verdicts", ())}
    scores = {
        row["path"]: row for row in rows.get("scores", ()) if not row["reason"].startswith(RETEST)
    }
    for path in rows["paths"]:
        verdict = verdicts.get(path["key"])
        score = scores.get(path["key"], {})
        yield {
            "key": path["key"],
            "question": path["question"],
            "round": round_name(prefix),
            "steps": [[step["title"], step["content"]] for step in path["steps"]],
            "answer": path["answer"],
            "finish": path["finish"],
            "tokens": path["tokens"],
            "outcome": outcome(verdict["correct"]) if verdict else "unjudged",
            "rule": verdict["rule"] if verdict else "",
            "detail": verdict["detail"] if verdict else "",
            "marks": {name: score.get(name) for name in ("logic", "grounding", "completeness")},
            "total": score.get("total"),
            "unscored": score.get("reason", ""),
            "bad": list(score.get("bad_steps", ())),
        }


def _uses(run: Path, keys: set[str]) -> dict[str, list[str]]:
    """What became of these paths: the sets that hold them and the pairs they won or lost."""
    found: dict[str, dict[str, None]] = {}

    def note(names: Iterable[str], use: str) -> None:
        for name in names:
            if name in keys:
                found.setdefault(name, {})[use] = None

    for stage in stage_names(run):
        if not complete(run, stage):
            continue
        if stage.startswith("set-"):
            for row in shards.read_rows(shard_folder(run, stage)):
                note(row["parents"], f"{stage.removeprefix('set-')} set")
        elif stage.endswith("-pairs"):
            for row in shards.read_rows(shard_folder(run, stage)):
                winner, _, loser = row["key"].partition("|")
                note([winner], "chosen in a pair")
                note([loser], "rejected in a pair")
    return {key: list(uses) for key, uses in found.items()}
