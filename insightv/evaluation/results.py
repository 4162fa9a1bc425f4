"""``results.json``: the ladder with intervals, paired differences, confusion, harm and rescue.

Accuracy is the share of right answers among the decided ones; undecided and failed
questions are counted beside it, never as wrong. A paired difference rests on the questions
that both entries have decided. All shares are fractions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpc import shards
from hpc.config import read_yaml
from hpc.rundir import RunDir, write_json
from insightv.evaluation import stopping
from insightv.evaluation.benchmark_scores import read_scores
from insightv.evaluation.funnel import complete, funnel, known, shard_folder, stage_names
from insightv.evaluation.statistics import Estimate, accuracy, paired_difference, verdict_name
from insightv.records import Question

Results = dict[str, Any]

LADDER = (
    "base",
    "base_reasoning",
    "direct_sft",
    "multi_turn",
    "summary_only",
    "multi_agent",
    "dpo",
    "iterative_dpo",
)
"""The order of the ladder; entries of other names (controls) follow in their own order."""

PAPER: dict[str, dict[str, float]] = {
    "base": {"chartqa": 0.757, "average": 0.592},
    "direct_sft": {"chartqa": 0.792, "average": 0.606},
    "multi_turn": {"chartqa": 0.796, "average": 0.610},
    "summary_only": {"chartqa": 0.763, "average": 0.598},
    "multi_agent": {"chartqa": 0.812, "average": 0.621},
    "dpo": {"average": 0.627},
    "iterative_dpo": {"chartqa": 0.815, "average": 0.633},
}
"""What Insight-V reports on its own base: arXiv 2411.14432, tables 1, 3 and 4."""

PAPER_PERCEPTION: dict[str, tuple[float, float]] = {
    "TextVQA": (0.754, 0.768),
    "DocVQA": (0.902, 0.915),
    "OCRBench": (0.713, 0.735),
    "AI2D": (0.797, 0.798),
}
"""The paper's table 2: its own base, and Insight-V on it (OCRBench as a share of its 1,000)."""

QUESTIONS = ("questions-test", "questions-validation")
"""Stages whose questions entries may have answered."""

CARD = ("agent", "none", "other")
"""Whose reasoning the summary agent is given: the agent's, nobody's, another question's."""


@dataclass(slots=True)
class Told:
    """What one entry did with one question, without its texts."""

    correct: bool | None
    reasoning: str
    tokens: int


@dataclass
class Asked:
    """The test questions and what every entry told about them.

    Attributes:
        questions: Benchmark, task and group of each question, by key.
        told: Entry, then question, to what it did.
        failed: Entry, then benchmark, to the number of questions that failed.
        benchmarks: Names of the question sets that were answered; ``charts`` first.
    """

    questions: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    told: dict[str, dict[str, Told]] = field(default_factory=dict)
    failed: dict[str, Counter[str]] = field(default_factory=dict)
    benchmarks: list[str] = field(default_factory=list)

    @property
    def main(self) -> str:
        """The question set the run trains for; empty without predictions."""
        return self.benchmarks[0] if self.benchmarks else ""

    def decided(self, *entries: str, benchmark: str) -> list[str]:
        """Questions of a benchmark that every one of the entries has decided."""
        return [
            key
            for key, (name, _, _) in self.questions.items()
            if name == benchmark
            and all(
                (told := self.told[entry].get(key)) is not None and told.correct is not None
                for entry in entries
            )
        ]


def write_results(run: Path, seed: int = 0) -> Results:
    """Collects the results and writes ``results.json`` into the run directory."""
    results = collect(run, seed)
    write_json(RunDir(run).results, results)
    return results


def collect(run: Path, seed: int = 0) -> Results:
    """Reads every complete stage of a run; what is not there yet is empty or null.

    Args:
        run: The run directory.
        seed: Seed of the resamples.
    """
    asked = read_predictions(run)
    card = {name for name in asked.told if name.rpartition(":")[2] in CARD}
    entries = sorted(asked.told.keys() - card, key=ladder_place)
    return {
        "run": run.resolve().name,
        "seed": seed,
        "made_from": made_from(run),
        "benchmarks": asked.benchmarks,
        "ladder": [
            _rung(asked, entry, benchmark, seed)
            for benchmark in asked.benchmarks
            for entry in entries
        ],
        "tasks": {entry: _tasks(asked, entry) for entry in entries},
        "differences": [
            _difference(asked, second, first, benchmark, seed)
            for benchmark in asked.benchmarks
            for first, second in itertools.combinations(entries, 2)
        ],
        "confusion": confusion(asked, entries),
        "judge_card": _judge_card(asked, seed),
        "funnel": (counts := funnel(run)),
        "score_agreement": {row["round"]: row["agreement"] for row in counts["rounds"]},
        "training": training(run),
        "early_stop": stopping.summary(run),
        "lmms": read_scores(run),
    }


def made_from(run: Path) -> dict[str, str]:
    """Every complete stage that results may rest on, with a digest of its manifest."""
    return {
        stage: hashlib.sha256(RunDir(run).manifest(stage).read_bytes()).hexdigest()[:16]
        for stage in stage_names(run)
        if stage not in ("results", "report") and complete(run, stage)
    }


def eval_stage(entry: str) -> str:
    """The stage in which an entry of the ladder answers."""
    return f"eval-{entry}".replace("_", "-")


def entries_of(run: Path) -> list[str] | None:
    """The entries that the run's ``chain.yaml`` asks for; None where it says nothing of them."""
    path = RunDir(run).chain_file
    written = read_yaml(path) if path.is_file() else {}
    entries = (written.get("evaluation") or {}).get("entries")
    return None if entries is None else [str(entry) for entry in entries]


def read_predictions(run: Path) -> Asked:
    """The predictions of every complete ``eval-`` stage, with the questions they answer.

    An entry that was taken out of the chain since is left out, though its folder stands.
    """
    entries = entries_of(run)
    wanted = None if entries is None else {eval_stage(entry) for entry in entries}
    asked = Asked()
    for stage in QUESTIONS:
        for row in shards.read_rows(shard_folder(run, stage)) if complete(run, stage) else ():
            question = Question.from_json(row)
            place = (question.benchmark, question.task, question.group or question.key)
            asked.questions[question.key] = place
    for stage in stage_names(run):
        if not stage.startswith("eval-") or not complete(run, stage):
            continue
        if wanted is not None and stage not in wanted:
            continue
        seen = set()
        for row in shards.read_rows(shard_folder(run, stage)):
            if row["question"] not in asked.questions:
                continue
            seen.add(row["entry"])
            reasoning = "none"
            if row["reasoning"]:
                found = row["reasoning_answer"] or row["reasoning_correct"] is not None
                reasoning = verdict_name(row["reasoning_correct"]) if found else "unanswered"
            asked.told.setdefault(row["entry"], {})[row["question"]] = Told(
                row["correct"], reasoning, row["tokens"]
            )
        failed = Counter(
            key.split(":", 1)[0] for key, _ in shards.read_errors(shard_folder(run, stage))
        )
        asked.failed |= dict.fromkeys(seen, failed)
    told = {key for rows in asked.told.values() for key in rows}
    names = {asked.questions[key][0] for key in told}
    asked.benchmarks = sorted(names, key=lambda name: (name != "charts", name))
    return asked


def ladder_place(entry: str) -> tuple[int, str]:
    """Sorts entries: the ladder's in its order, then the controls."""
    return (LADDER.index(entry) if entry in LADDER else len(LADDER), entry)


def _interval(estimate: Estimate) -> list[float] | None:
    return [estimate.low, estimate.high] if estimate.n else None


def _rung(asked: Asked, entry: str, benchmark: str, seed: int) -> dict[str, Any]:
    """One entry on one benchmark."""
    told = {
        key: told for key, told in asked.told[entry].items() if asked.questions[key][0] == benchmark
    }
    decided = asked.decided(entry, benchmark=benchmark)
    estimate = accuracy(
        [bool(told[key].correct) for key in decided],
        [asked.questions[key][2] for key in decided],
        seed,
    )
    return {
        "name": entry,
        "benchmark": benchmark,
        "accuracy": known(estimate.value),
        "ci95": _interval(estimate),
        "n": estimate.n,
        "groups": estimate.groups,
        "undecided": len(told) - len(decided),
        "failed": asked.failed.get(entry, Counter())[benchmark],
        "tokens": sum(row.tokens for row in told.values()) / len(told) if told else None,
        "paper": PAPER.get(entry) if benchmark == "charts" else None,
    }


def _tasks(asked: Asked, entry: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy by benchmark and task."""
    counts: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for key, told in asked.told[entry].items():
        if told.correct is not None:
            benchmark, task, _ = asked.questions[key]
            counts[benchmark][task].append(told.correct)
    return {
        benchmark: {
            task: {"accuracy": sum(right) / len(right), "n": len(right)}
            for task, right in sorted(tasks.items())
        }
        for benchmark, tasks in sorted(counts.items())
    }


def _difference(asked: Asked, entry: str, other: str, benchmark: str, seed: int) -> dict[str, Any]:
    """``entry`` minus ``other`` on the questions both have decided."""
    keys = asked.decided(entry, other, benchmark=benchmark)
    estimate = paired_difference(
        [bool(asked.told[entry][key].correct) for key in keys],
        [bool(asked.told[other][key].correct) for key in keys],
        [asked.questions[key][2] for key in keys],
        seed,
    )
    return {
        "name": f"{entry} - {other}",
        "entry": entry,
        "other": other,
        "benchmark": benchmark,
        "difference": known(estimate.value),
        "ci95": _interval(estimate),
        "n": estimate.n,
        "paper": paper_difference(entry, other) if benchmark == "charts" else None,
    }


def paper_difference(entry: str, other: str) -> dict[str, float] | None:
    """What the paper found for ``entry`` minus ``other``; None where it has not both."""
    if entry not in PAPER or other not in PAPER:
        return None
    shared = PAPER[entry].keys() & PAPER[other].keys()
    return {name: round(PAPER[entry][name] - PAPER[other][name], 3) for name in sorted(shared)}


def confusion(asked: Asked, entries: Iterable[str]) -> dict[str, dict[str, int]]:
    """Entry to counts of ``reasoning_<right|wrong|…>_answer_<…>`` on the first benchmark.

    Only entries whose reasoning has an answer of its own have one (the paper's figure 6).
    """
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        for key, told in asked.told[entry].items():
            if told.reasoning != "none" and asked.questions[key][0] == asked.main:
                table[entry][f"reasoning_{told.reasoning}_answer_{verdict_name(told.correct)}"] += 1
    return {
        entry: dict(sorted(counts.items()))
        for entry, counts in table.items()
        if any("unanswered" not in name for name in counts)
    }


def _judge_card(asked: Asked, seed: int) -> dict[str, Any] | None:
    """How the summary agent fares with reasoning from the agent, none, or another question.

    Harm is the share of the questions it answers rightly unaided that the reasoning turns
    wrong; rescue the share of those it answers wrongly unaided that the reasoning turns right.
    """
    names = {entry.rpartition(":")[0] for entry in asked.told if entry.endswith(":none")}
    if not names or not asked.benchmarks:
        return None
    name = min(names)
    entries = {card: f"{name}:{card}" for card in CARD if f"{name}:{card}" in asked.told}
    card: dict[str, Any] = {"entry": name, "benchmark": asked.main}
    keys = asked.decided(*entries.values(), benchmark=card["benchmark"])
    groups = [asked.questions[key][2] for key in keys]
    right = {
        mode: [bool(asked.told[entry][key].correct) for key in keys]
        for mode, entry in entries.items()
    }
    card |= {"n": len(keys), "ci95": {}, "harm": {}, "rescue": {}}
    for mode, answers in right.items():
        estimate = accuracy(answers, groups, seed)
        card[mode] = known(estimate.value)
        card["ci95"][mode] = _interval(estimate)
        if mode == "none":
            continue
        card["harm"][mode] = turned(right["none"], answers, was=True)
        card["rescue"][mode] = turned(right["none"], answers, was=False)
    return card


def turned(before: list[bool], after: list[bool], was: bool) -> dict[str, Any]:
    """Of the answers that were right (wrong), how many changed."""
    of = sum(value == was for value in before)
    changed = sum(a == was and b != was for a, b in zip(before, after, strict=True))
    return {"changed": changed, "of": of, "share": changed / of if of else None}


def training(run: Path) -> dict[str, Any]:
    """Each training's ``metrics.jsonl``: where it is, and its first and last values."""
    found = {}
    for stage in stage_names(run):
        path = run / "stages" / stage / "metrics.jsonl"
        if rows := read_metrics(path):
            first, last = rows[0], rows[-1]
            found[stage] = {
                "file": str(path.relative_to(run)),
                "steps": len(rows),
                "first": {name: first[name] for name in sorted(first)},
                "last": {name: last[name] for name in sorted(last)},
            }
    return found


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The finite numbers of each line; a line cut off by a kill is passed over."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            numbers = {
                name: float(value)
                for name, value in row.items()
                if isinstance(value, (int, float))
                and not isinstance(value, bool)
                and abs(value) < float("inf")
            }
            if numbers:
                rows.append(numbers)
    return rows


def results_table(results: Mapping[str, Any]) -> Table:
    """The ladder as a terminal table: a row an entry, a column a benchmark, in per cent."""
    table = Table(title="What each step was worth", caption=_caption(results))
    table.add_column("entry")
    for benchmark in results["benchmarks"]:
        table.add_column(f"{escape(benchmark)} [dim]%[/]", justify="right")
    table.add_column("− base [dim]points[/]", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("paper [dim]ChartQA[/]", justify="right")
    cells = {(row["name"], row["benchmark"]): row for row in results["ladder"]}
    gains = {(row["entry"], row["other"], row["benchmark"]): row for row in results["differences"]}
    main = results["benchmarks"][0] if results["benchmarks"] else ""
    for entry in dict.fromkeys(row["name"] for row in results["ladder"]):
        rung = cells[entry, main]
        gain = gains.get((entry, "base", main))
        paper = (rung["paper"] or {}).get("chartqa")
        table.add_row(
            escape(entry),
            *(percent(cells[entry, benchmark]) for benchmark in results["benchmarks"]),
            points(gain) if gain else "",
            "" if rung["tokens"] is None else f"{rung['tokens']:.0f}",
            "" if paper is None else f"{100 * paper:.1f}",
        )
    return table


def percent(rung: Mapping[str, Any]) -> str:
    """``61.2 [58.0, 64.1]``."""
    if rung["accuracy"] is None:
        return "–"
    low, high = rung["ci95"]
    return f"{100 * rung['accuracy']:.1f} [dim]\\[{100 * low:.1f}, {100 * high:.1f}][/]"


def points(row: Mapping[str, Any]) -> str:
    """``+4.1 [1.0, 7.2]``."""
    if row["difference"] is None:
        return "–"
    low, high = row["ci95"]
    return f"{100 * row['difference']:+.1f} [dim]\\[{100 * low:+.1f}, {100 * high:+.1f}][/]"


def _caption(results: Mapping[str, Any]) -> str:
    """What the numbers rest on."""
    main = results["benchmarks"][0] if results["benchmarks"] else ""
    rungs = [row for row in results["ladder"] if row["benchmark"] == main]
    if not rungs:
        return "no entry of the ladder is complete yet"
    undecided = sum(row["undecided"] for row in results["ladder"])
    failed = sum(row["failed"] for row in results["ladder"])
    text = (
        f"95 % intervals by resampling {rungs[0]['groups']} tables ({main}: {rungs[0]['n']} "
        f"questions); differences are paired, on {main}"
    )
    if undecided or failed:
        text += f"; left out: {undecided} undecided, {failed} failed"
    return text
