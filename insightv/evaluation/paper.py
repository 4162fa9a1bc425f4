"""The paper's tables 1–4, beside what a run's benchmarks came to.

Insight-V, arXiv 2411.14432; the numbers stand here for the order of things, since bases, data
and versions of the benchmarks differ. In per cent, but for MME (sums of points) and OCRBench
(right answers of 1,000).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OWN, LLAVA = "paper, own base", "paper, LLaVA-NeXT"


@dataclass(frozen=True)
class Column:
    """A benchmark as the paper names it.

    Attributes:
        name: Its name there.
        tasks: Tasks of lmms-eval whose mean it is; of several alternatives the first there is.
        metric: Their metric.
        scale: What the metric is multiplied by.
    """

    name: str
    tasks: tuple[tuple[str, ...], ...]
    metric: str
    scale: float = 100.0


COLUMNS = (
    Column("MMMU", (("mmmu_val",),), "mmmu_acc"),
    Column("MMMU-Pro", (("mmmu_pro_standard", "mmmu_pro_vision"),), "mmmu_acc"),
    Column("MMBench", (("mmbench_en_dev",), ("mmbench_en_dev_static",)), "gpt_eval_score", scale=1),
    Column("MME perception", (("mme",),), "mme_perception_score", scale=1),
    Column("MME cognition", (("mme",),), "mme_cognition_score", scale=1),
    Column("ChartQA", (("chartqa",),), "relaxed_overall"),
    Column("MMStar", (("mmstar",),), "average"),
    Column(
        "MathVista",
        (("mathvista_testmini_format",), ("mathvista_testmini_cot",)),
        "llm_as_judge_eval",
        scale=1,
    ),
    Column("TextVQA", (("textvqa_val",),), "exact_match"),
    Column("DocVQA", (("docvqa_val",),), "anls"),
    Column("OCRBench", (("ocrbench",),), "ocrbench_accuracy", scale=1000),
    Column("AI2D", (("ai2d",),), "exact_match"),
)
"""Which task of lmms-eval stands for which benchmark: this project's choice where the paper does
not say (MMMU-Pro is the mean of its two parts, as its authors define it)."""

_MAIN = (
    *("MMMU", "MMMU-Pro", "MMBench", "MME perception", "MME cognition"),
    *("ChartQA", "MMStar", "MathVista"),
)
_SEEING = ("TextVQA", "DocVQA", "OCRBench", "AI2D")
_ABLATED = ("MMMU", "ChartQA", "MathVista", "MMStar")

Numbers = Mapping[str, Mapping[str, Sequence[float]]]
_TABLE_1: dict[str, dict[str, Sequence[float]]] = {
    "base": {
        OWN: (47.1, 22.6, 81.3, 1573.7, 482.5, 75.7, 57.0, 56.9),
        LLAVA: (36.9, 13.2, 72.3, 1611.1, 346.0, 69.4, 43.1, 45.9),
    },
    "multi_agent": {
        OWN: (49.7, 23.8, 82.2, 1662.2, 629.3, 81.2, 58.6, 58.7),
        LLAVA: (40.8, 17.8, 77.6, 1603.7, 469.3, 74.6, 52.6, 47.4),
    },
    "iterative_dpo": {
        OWN: (50.2, 24.9, 82.3, 1685.1, 627.0, 81.5, 61.5, 59.9),
        LLAVA: (42.0, 21.0, 81.7, 1583.9, 485.4, 77.4, 57.4, 49.8),
    },
}
_TABLE_2: dict[str, dict[str, Sequence[float]]] = {
    "base": {OWN: (75.4, 90.2, 713, 79.7), LLAVA: (65.2, 78.2, 553, 71.5)},
    "iterative_dpo": {OWN: (76.8, 91.5, 735, 79.8), LLAVA: (70.5, 82.9, 663, 77.3)},
}
_TABLE_3: dict[str, dict[str, Sequence[float]]] = {
    "base": {OWN: (47.1, 75.7, 56.9, 57.0, 59.2)},
    "direct_sft": {OWN: (47.0, 79.2, 57.6, 58.4, 60.6)},
    "multi_turn": {OWN: (48.1, 79.6, 57.9, 58.2, 61.0)},
    "summary_only": {OWN: (47.5, 76.3, 57.3, 57.9, 59.8)},
    "multi_agent": {OWN: (49.7, 81.2, 58.7, 58.6, 62.1)},
}
_TABLE_4: dict[str, dict[str, Sequence[float]]] = {
    "multi_agent": {OWN: (62.1,)},
    "dpo": {OWN: (62.7,)},
    "iterative_dpo": {OWN: (63.3,)},
}
_AVERAGE = "average"
"""The paper's averages in tables 3 and 4 are means over table 3's four benchmarks."""


@dataclass(frozen=True)
class PaperTable:
    """A table, in texts.

    Attributes:
        title: What it is.
        header: Names of its columns.
        rows: Cells, the first of each names it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(found: Mapping[str, Any]) -> list[PaperTable]:
    """The paper's tables with the run's numbers above the paper's, then all there is.

    Args:
        found: As `insightv.evaluation.benchmark_scores.summary` makes it.

    Returns:
        Of the paper's tables those that the run has a number for.
    """
    scores = {(row["task"], row["metric"], row["entry"]): row for row in found["scores"]}
    wanted = (
        ("Table 1: the benchmarks", _MAIN, _TABLE_1),
        ("Table 2: perception is kept", _SEEING, _TABLE_2),
        ("Table 3: what the two agents are worth", (*_ABLATED, _AVERAGE), _TABLE_3),
        (f"Table 4: average of {', '.join(_ABLATED)}", (_AVERAGE,), _TABLE_4),
    )
    made = [
        PaperTable(f"The paper's {title}", ("entry", *names), tuple(_rows(names, numbers, scores)))
        for title, names, numbers in wanted
        if any(_cell(scores, name, entry) for name in names for entry in numbers)
    ]
    return [*made, _all(found), *_gains(found), _beside(found), *_confusion(found)]


def markdown(found: Mapping[str, Any]) -> str:
    """`tables` as Markdown."""
    lines = []
    for table in tables(found):
        lines += [
            f"**{table.title}**",
            "",
            *map(_line, (table.header, ["---"] * len(table.header))),
        ]
        lines += [*map(_line, table.rows), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


Scores = Mapping[tuple[str, str, str], Mapping[str, Any]]


def _rows(names: Sequence[str], numbers: Numbers, scores: Scores) -> list[tuple[str, ...]]:
    """A row for each entry, and below it one for each base of the paper."""
    made = []
    for entry, papers in numbers.items():
        made.append((entry, *(_cell(scores, name, entry) or "–" for name in names)))
        for base, values in papers.items():
            made.append((f"– {base}", *(f"{value:g}" for value in values)))
    return made


def _parts(scores: Scores, name: str, entry: str) -> tuple[Column, list[Mapping[str, Any]]] | None:
    """The scores behind one of the paper's numbers; None where one is missing."""
    column = next(column for column in COLUMNS if column.name == name)
    for tasks in column.tasks:
        found = [scores.get((task, column.metric, entry)) for task in tasks]
        if all(found):
            return column, [row for row in found if row is not None]
    return None


def _cell(scores: Scores, name: str, entry: str) -> str:
    """``77.4 [74.0, 80.1]``; an interval where there is one score. Empty where there is none."""
    if name == _AVERAGE:
        return _average(scores, entry)
    if (there := _parts(scores, name, entry)) is None:
        return ""
    column, rows = there
    if len(rows) == 1:
        return _told(rows[0], column.scale)
    return f"{column.scale * sum(row['value'] for row in rows) / len(rows):.1f}"


def _average(scores: Scores, entry: str) -> str:
    """The mean of the benchmarks it is taken over, where all of them are there."""
    there = [_parts(scores, name, entry) for name in _ABLATED]
    values = [
        column.scale * sum(row["value"] for row in rows) / len(rows)
        for column, rows in (parts for parts in there if parts is not None)
    ]
    return f"{sum(values) / len(values):.1f}" if len(values) == len(_ABLATED) else ""


def _told(row: Mapping[str, Any], scale: float, sign: str = "-") -> str:
    told = f"{scale * row['value']:{sign}.1f}"
    if row["ci95"]:
        low, high = (scale * end for end in row["ci95"])
        told += f" [{low:{sign}.1f}, {high:{sign}.1f}]"
    return told.replace("-", "−")


def _all(found: Mapping[str, Any]) -> PaperTable:
    """Every metric as lmms-eval gives it, a column an entry."""
    entries = list(dict.fromkeys(row["entry"] for row in found["scores"]))
    cells = {(row["task"], row["metric"], row["entry"]): row for row in found["scores"]}
    rows = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in found["scores"]):
        there = [cells.get((task, metric, entry)) for entry in entries]
        most = max(row["n"] for row in there if row)
        scale = 100 if all(abs(row["value"]) <= 1 for row in there if row) else 1
        told = (_told(row, scale) if row else "–" for row in there)
        rows.append((task, metric, f"{most:,}", *told))
    title = f"Every score of lmms-eval {found.get('version', '')}, 95 % intervals"
    return PaperTable(title, ("task", "metric", "n", *entries), tuple(rows))


def _gains(found: Mapping[str, Any]) -> list[PaperTable]:
    """Paired differences, in points."""
    rows = []
    for row in found["differences"]:
        if row["difference"] is None:
            continue
        scale = 100 if max(map(abs, row["ci95"])) <= 1 else 1
        told = _told({**row, "value": row["difference"]}, scale, "+")
        rows.append((row["task"], row["metric"], f"{row['entry']} − {row['other']}", told))
    header = ("task", "metric", "difference", "points")
    return [PaperTable("Differences, paired by question", header, tuple(rows))] if rows else []


def _confusion(found: Mapping[str, Any]) -> list[PaperTable]:
    """Reasoning × answer (the paper's figure 6), by this package's own verdicts."""
    kinds = [(a, b) for a in ("right", "wrong") for b in ("right", "wrong")]
    rows = []
    for task, entries in found["confusion"].items():
        for entry, counts in entries.items():
            cells = [counts.get(f"reasoning_{a}_answer_{b}", 0) for a, b in kinds]
            others = sum(counts.values()) - sum(cells)
            rows.append((task, entry, *(f"{count:,}" for count in [*cells, others])))
    header = ("task", "entry", *(f"reasoning {a}, answer {b}" for a, b in kinds), "undecided")
    title = "What became of right and wrong reasoning (the paper's figure 6)"
    return [PaperTable(title, header, tuple(rows))] if rows else []


def _beside(found: Mapping[str, Any]) -> PaperTable:
    """This package's own verdicts on the same answers."""
    failed = {(row["task"], row["entry"]): row["failed"] for row in found["scores"]}
    rows = [
        (
            row["task"],
            row["entry"],
            "–" if row["accuracy"] is None else _told({**row, "value": row["accuracy"]}, 100),
            f"{row['n']:,}",
            f"{row['undecided']:,}",
            f"{failed.get((row['task'], row['entry']), 0):,}",
            f"{row['differ']:,}",
        )
        for row in found["own"]
    ]
    header = ("task", "entry", "accuracy", "decided", "undecided", "failed", "differ")
    return PaperTable("This package's own verdicts on the same answers", header, tuple(rows))
