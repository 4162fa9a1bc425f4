"""Where a record comes from and what became of it: the tree behind ``insightv why``.

Everything about one question stands under its key in every stage, so one pass over the
shards finds the lineage of any record; memory holds that question's rows only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from hpc.errors import UserError, printable
from hpc.rundir import RunDir
from hpc.shards import read_entries, shard_path, sidecars
from hpc.stages import Row, Stage
from insightv.evaluation.stopping import CHOICE

_KEY = re.compile(
    r"(?:(?:reasoning|summary):)?(?P<question>[^/@]+?)(?:/r\d+/p\d+)?"
    r"(?:/(?:reasoning|direct|multi_turn|summary|plain)|@.+)?"
)


def question_of(key: str) -> str:
    """The question's key within the key of a path, pair, sample, prediction or question.

    >>> question_of("charts:train:7/r1/p0|charts:train:7/r1/p3")
    'charts:train:7'
    """
    first = key.split("|", 1)[0]
    match = _KEY.fullmatch(first)
    return match["question"] if match else first


@dataclass
class Trace:
    """Every row a run holds about one question.

    Attributes:
        question: The question's key.
        rows: Stage to its rows, in the order of the chain; one list per kind of record.
        errors: Stage to the reason it failed this question.
    """

    question: str
    rows: dict[str, list[Row]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def of(self, mark: str) -> Iterator[tuple[str, Row]]:
        """(stage, row) of each record that has the field ``mark``."""
        for stage, rows in self.rows.items():
            for row in rows:
                if mark in row:
                    yield stage, row

    @cached_property
    def paths(self) -> dict[str, tuple[str, Row]]:
        """Path key to its stage and row."""
        return {row["key"]: (stage, row) for stage, row in self.of("steps")}

    @property
    def failed_paths(self) -> list[tuple[str, Row]]:
        """(stage, row) of paths that came to nothing."""
        return [(stage, row) for stage, row in self.of("reason") if "path" not in row]


def trace(run: RunDir, stages: Mapping[str, Stage], key: str) -> Trace:
    """Collects the rows of the question behind ``key`` from every stage that has shards.

    The index of the question's shard is the same in a map stage as in its input, so only
    what jobs wrote (questions, sets, pairs) is searched.
    """
    found = Trace(question_of(key))
    places: dict[str, int] = {}
    for name, stage in stages.items():
        folder = run.shards(name)
        indices = sorted(sidecars(folder)) if folder.is_dir() else []
        first = next(iter(stage.inputs.values()), "")
        if stage.kind == "map":
            indices = [index for index in indices if index == places.get(first)]
        for index in indices:
            if _read(found, name, shard_path(folder, index)):
                places[name] = index
                break
    return found


def _read(found: Trace, stage: str, shard: Path) -> bool:
    """Adds what a shard holds about the question; whether the question is a key of its own."""
    for entry in read_entries(shard):
        if found.question not in entry.key:
            continue
        rows = [json.loads(row) for row in entry.rows]
        own = entry.key == found.question
        rows = [row for row in rows if own or row.get("question") == found.question]
        if rows:
            found.rows.setdefault(stage, []).extend(rows)
        if own:
            if entry.error:
                found.errors[stage] = entry.error
            return True
    return False


def why(run: RunDir, stages: Mapping[str, Stage], key: str) -> Tree:
    """The lineage of a question, path, pair, training sample or prediction, as a tree.

    Raises:
        UserError: The run holds no such record.
    """
    return _Teller(run, stages, trace(run, stages, key)).tell(key)


class _Teller:
    """Writes one question's trace as a tree, around the record that was asked for."""

    def __init__(self, run: RunDir, stages: Mapping[str, Stage], found: Trace):
        self.run, self.stages, self.found = run, stages, found

    def tell(self, key: str) -> Tree:
        root = self._question()
        samples = [(s, row) for s, row in self.found.of("messages") if row["key"] == key]
        pairs = [(s, row) for s, row in self.found.of("chosen") if row["key"] == key]
        predictions = [(s, row) for s, row in self.found.of("entry") if row["key"] == key]
        if key == self.found.question:
            self._everything(root)
        elif key in self.found.paths:
            self._path(root, key)
        elif pairs:
            self._pair(root, pairs)
        elif samples:
            self._sample(root, *samples[-1])
        elif predictions:
            self._prediction(root, *predictions[-1])
        elif not self._failures(root, key):
            raise UserError(self._missing(key))
        return root

    def _question(self) -> Tree:
        for stage, row in self.found.of("answer_type"):
            root = Tree(_line((self.found.question, "bold"), f"  {row['text']}"), guide_style="dim")
            root.add(_line("true answer ", (row["answer"], "green"), f" ({row['answer_type']})"))
            about = [
                row["task"] and f"task {row['task']}",
                row["group"] and f"table {row['group']}",
            ]
            root.add(_line(", ".join([*filter(None, about), f"stage {stage}"]), style="dim"))
            for picture in row["pictures"]:
                folder = self.run.stage_dir(stage) / "pictures"
                root.add(_line(f"picture {picture[:16]}… in {folder}", style="dim"))
            for name, reason in self.found.errors.items():
                root.add(_line((f"failed in {name}: ", "red"), reason))
            return root
        raise UserError(
            f"{self.run.path}: no question {self.found.question!r}; "
            "keys look like charts:train:7, and `insightv shards cat` lists them"
        )

    def _missing(self, key: str) -> str:
        keys = [*self.found.paths, *(row["key"] for _, row in self.found.of("chosen"))]
        keys += [row["key"] for _, row in self.found.of("entry")]
        hint = f"it has {keys[0]}" if keys else "no stage has worked on it yet"
        return f"{self.run.path}: no record {key!r} of question {self.found.question}; {hint}"

    def _everything(self, root: Tree) -> None:
        """A question: every path in a line, and the predictions."""
        for key, (stage, row) in self.found.paths.items():
            branch = root.add(_line((key, "cyan"), f" → {row['answer']!r}  ", self._verdict(key)))
            branch.add(_line(f"{len(row['steps'])} steps, {row['finish']}, {stage}", style="dim"))
            self._uses(branch, key)
        self._failures(root)
        for stage, row in self.found.of("entry"):
            root.add(
                _line((row["key"], "cyan"), f" → {row['answer']!r}  ", _right(row), f"  {stage}")
            )

    def _failures(self, root: Tree, key: str = "") -> bool:
        """Paths without a usable step (or the one of that key); whether there are any."""
        rows = [(s, row) for s, row in self.found.failed_paths if not key or row["key"] == key]
        for stage, row in rows:
            branch = root.add(_line((row["key"], "cyan"), (" failed: ", "red"), row["reason"]))
            branch.add(_line(f"{stage}: {row['text']}", style="dim"))
        return bool(rows)

    def _path(self, root: Tree, key: str, label: str = "") -> None:
        """A path in full, what was thought of it, and what it went into."""
        if key not in self.found.paths:
            root.add(_line((key, "cyan"), ": not in the run any more"))
            return
        stage, row = self.found.paths[key]
        branch = root.add(_line(label, (key, "cyan"), f" → {row['answer']!r}"))
        branch.add(
            _line(
                f"{stage}: model {row['model']}, prompt {row['prompt']}, seed {row['seed']}, "
                f"{row['tokens']} tokens, {row['attempts']} calls, ended by {row['finish']}",
                style="dim",
            )
        )
        bad = {number for _, score in self._scores(key) for number in score["bad_steps"]}
        for number, step in enumerate(row["steps"], 1):
            mark = (" flagged", "red") if number in bad else ""
            branch.add(_line((f"{number} {step['title']}", "bold"), mark, f"\n{step['content']}"))
        for name, verdict in self._verdicts(key):
            told = f" by {verdict['rule']}" + (
                f": {verdict['detail']}" if verdict["detail"] else ""
            )
            model = f", model {verdict['model']}" if verdict["model"] else ""
            branch.add(_line(f"{name}: ", _right(verdict), told + model))
        for name, score in self._scores(key):
            parts = ("total", "logic", "grounding", "completeness")
            told = ", ".join(f"{part} {score[part]}" for part in parts)
            numbers = [told] if score["total"] is not None else []
            branch.add(_line(f"{name}: ", "; ".join([*numbers, *filter(None, [score["reason"]])])))
        self._uses(branch, key)

    def _pair(self, root: Tree, held: list[tuple[str, Row]]) -> None:
        """A pair, which several sets may hold: that of its round, that of the control."""
        _, row = held[0]
        gap = "" if row["gap"] is None else f", gap {row['gap']}"
        branch = root.add(_line((row["key"], "cyan"), f" {row['kind']}{gap}"))
        winner, _, loser = row["key"].partition("|")
        self._path(branch, winner, "chosen ")
        self._path(branch, loser, "rejected ")
        for stage, row in held:
            if row["reference_chosen"] is None:
                self._models(branch.add(_line("→ ", (stage, "magenta"))), stage)
            else:
                told = (
                    f"{stage}: reference log-probabilities chosen {row['reference_chosen']:.2f}, "
                    f"rejected {row['reference_rejected']:.2f} nats, model {row['reference_model']}"
                )
                branch.add(_line(told, style="dim"))

    def _sample(self, root: Tree, stage: str, row: Row) -> None:
        branch = root.add(_line((row["key"], "cyan"), f" {row['kind']}  ({stage})"))
        for parent in row["parents"]:
            if parent in self.found.paths:
                self._path(branch, parent, "from ")
        for turn in row["messages"]:
            mark = (" (learned)", "green") if turn["train"] else ""
            branch.add(_line((turn["role"], "bold"), mark, f"\n{turn['text']}"))
        self._models(branch, stage)

    def _prediction(self, root: Tree, stage: str, row: Row) -> None:
        branch = root.add(
            _line(
                (row["key"], "cyan"), f" → {row['answer']!r}  ", _right(row), f" by {row['rule']}"
            )
        )
        if row["reasoning"]:
            held = row["reasoning_correct"]
            told = "arrives at no answer"
            if row["reasoning_answer"]:
                name = "undecided" if held is None else "right" if held else "wrong"
                told = f"arrives at {row['reasoning_answer']!r}, {name}"
            branch.add(_line((f"reasoning, {told}", "bold"), f"\n{row['reasoning']}"))
        branch.add(
            _line(
                f"{stage}: {row['tokens']} tokens, models {', '.join(row['models'])}", style="dim"
            )
        )
        for parent in self.stages[stage].after if stage in self.stages else ():
            for output in self.stages[parent].outputs:
                branch.add(_line(f"answered with {output} ({parent})", style="dim"))

    def _uses(self, branch: Tree, path: str) -> None:
        """Samples and pairs a path went into, each with the models trained on it."""
        for stage, row in self.found.of("messages"):
            if path in row["parents"]:
                label = _line("→ ", (stage, "magenta"), f" {row['kind']}, sample {row['key']}")
                self._models(branch.add(label), stage)
        for stage, row in self.found.of("chosen"):
            sides = row["key"].split("|")
            if path in sides and row["reference_chosen"] is None:
                side = "chosen" if path == sides[0] else "rejected"
                label = _line("→ ", (stage, "magenta"), f" {side} ({row['kind']}) in {row['key']}")
                self._models(branch.add(label), stage)

    def _models(self, branch: Tree, stage: str) -> None:
        """The models trained on a stage's rows, and what each was used for."""
        for name in self._trained_on(stage):
            manifest = self.run.read_manifest(name)
            for output in self.stages[name].outputs:
                users = [
                    other.name
                    for other in self.stages.values()
                    if name in other.after and other.name != "results"
                ]
                used = f", used by {', '.join(users)}" if users else ""
                leaf = branch.add(
                    _line("→ ", (output, "magenta"), f"{_state(manifest)} by {name}{used}")
                )
                self._chosen(leaf, output)

    def _chosen(self, branch: Tree, model: str) -> None:
        """Where rounds may stop early: whether this is the model they ended in, and why."""
        choice = (self.run.read_manifest(CHOICE) or {}).get("counts") or {}
        if choice.get("from") == model and CHOICE in self.stages:
            for target in self.stages[CHOICE].outputs:
                told = f" by {CHOICE}: {choice['said']}"
                branch.add(_line("→ ", (target, "magenta"), told))

    def _trained_on(self, stage: str) -> list[str]:
        """Stages that make a model from this one's rows, directly or through other rows."""
        found, rows = [], {stage}
        for name, other in self.stages.items():
            if rows & set(other.inputs.values()):
                if any(output.startswith("models/") for output in other.outputs):
                    found.append(name)
                else:
                    rows.add(name)
        return found

    def _verdicts(self, path: str) -> list[tuple[str, Row]]:
        return [(s, row) for s, row in self.found.of("correct") if row.get("path") == path]

    def _scores(self, path: str) -> list[tuple[str, Row]]:
        return [(s, row) for s, row in self.found.of("logic") if row["path"] == path]

    def _verdict(self, path: str) -> Text:
        """A path's verdict and total score, in a few words."""
        words = [_right(verdict) for _, verdict in self._verdicts(path)[-1:]]
        totals = [score["total"] for _, score in self._scores(path)[:1]]
        words += [_line(f" {total}/100") for total in totals if total is not None]
        return Text().join(words)


def _state(manifest: Mapping[str, Any] | None) -> str:
    """What there is to say of a stage beside that it makes a model."""
    if manifest is None:
        return " (not made yet)"
    skipped = manifest.get("skipped")
    return f" (not made: {skipped['reason']})" if skipped else ""


def _right(row: Row) -> Text:
    correct = row["correct"]
    if correct is None:
        return _line(("undecided", "yellow"))
    return _line(("right", "green") if correct else ("wrong", "red"))


def _line(*parts: str | tuple[str, str] | Text, style: str = "") -> Text:
    """Text as it is: no markup is read from it, and control characters are shown, not sent."""
    line = Text(style=style)
    for part in parts:
        if isinstance(part, Text):
            line.append_text(part)
        else:
            text, of = (part, "") if isinstance(part, str) else part
            line.append(printable(text), of or None)
    return line
