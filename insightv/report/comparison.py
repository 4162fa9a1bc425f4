"""A comparison of runs as Markdown, with its plots in a folder beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.disk import make_folder, write_atomic
from insightv.evaluation.comparison import ROUNDS, SIZE, Comparison
from insightv.evaluation.results import CARD, LADDER, PAPER_PERCEPTION
from insightv.report import drawings, plots

Row = Mapping[str, Any]

_AXES = {
    SIZE: "reasoning samples (mean over seeds)",
    ROUNDS: "rounds of preference optimisation",
}
_PAPER = {
    SIZE: "The paper (figure 4): 50,000 to 200,000 samples, rising throughout; at 50,000 barely "
    "above its baseline.",
    ROUNDS: "The paper (table 4, average): multi-agent 62.1, one round of DPO 62.7, three rounds "
    "63.3.",
}
_OUTCOMES = ("right", "wrong", "undecided", "unanswered")


def write_comparison(comparison: Comparison, out: Path | None, folder: Path | None) -> str:
    """Writes the plots and the text; a folder that is not there is made.

    Args:
        comparison: As `insightv.evaluation.comparison.compare` makes it.
        out: The Markdown file; None writes none.
        folder: Where the plots go; None draws none.

    Returns:
        The text.
    """
    drawn = {} if folder is None else dict(draw(comparison))
    if folder is not None:
        make_folder(folder)
        for name, text in drawn.items():
            write_atomic(folder / name, text)
    start = (out or Path("here")).absolute().parent
    beside = Path(os.path.relpath(folder.absolute(), start)).as_posix() if folder else ""
    text = markdown(comparison, {name: f"{beside}/{name}" for name in drawn})
    if out is not None:
        make_folder(out.absolute().parent)
        write_atomic(out, text)
    return text


def draw(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """File name and text of every plot."""
    for number, condition in enumerate(comparison["conditions"]):
        panels = [*drawings.ladder(condition), *drawings.differences(condition)]
        if panels:
            yield _ladder_file(number), plots.side_by_side(panels)
    for number, curve in enumerate(comparison["curves"]):
        if (lines := plots.lines_of(curve)) and max(len(line.points) for line in lines) > 1:
            title = f"{curve['benchmark']}: accuracy by {curve['key']}"
            axis = _AXES.get(curve["key"], curve["key"])
            yield _curve_file(number, curve), plots.curves(title, axis, lines)


def _ladder_file(number: int) -> str:
    return "ladder.svg" if number == 0 else f"ladder-{number + 1}.svg"


def _curve_file(number: int, curve: Row) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", curve["key"].lower())
    return f"{name}.svg" if number == 0 else f"{name}-{number + 1}.svg"


def markdown(comparison: Comparison, pictures: Mapping[str, str]) -> str:
    """The whole text.

    Args:
        comparison: What was compared.
        pictures: File name of a plot to its path from the text.
    """
    conditions = comparison["conditions"]
    parts = ["# Results", *_runs(conditions)]
    for number, condition in enumerate(conditions):
        parts += _condition(condition, pictures.get(_ladder_file(number)), len(conditions) > 1)
    for number, curve in enumerate(comparison["curves"]):
        parts += _curve(curve, pictures.get(_curve_file(number, curve)))
    commands = [command for one in conditions for command in one["commands"] if command]
    if commands:
        parts += ["## Commands", "\n".join(f"    {command}" for command in commands)]
    return "\n\n".join(parts) + "\n"


def _runs(conditions: Sequence[Row]) -> list[str]:
    """What was compared, and how its numbers are to be read."""
    rows = [
        [
            one["label"] or "the configuration of all runs",
            ", ".join(str(seed) for seed in one["seeds"]),
            ", ".join(one["runs"]),
            _questions(one),
        ]
        for one in conditions
    ]
    return [
        _table(["configuration", "seeds", "runs", "answers (tables)"], rows),
        "Accuracy is the share of right answers among the decided ones, in per cent, over all "
        "seeds together; differences are paired by question and seed, in points. 95 % intervals "
        "resample whole tables with the answers of all seeds: they speak of other tables under "
        "these seeds, while the columns by seed show what another seed changes. The paper's "
        "numbers are those of Insight-V on its own base.",
    ]


def _questions(condition: Row) -> str:
    """Answers of the entry with the most, by question set."""
    most: dict[str, Row] = {}
    for row in condition["ladder"]:
        if row["benchmark"] not in most or row["n"] > most[row["benchmark"]]["n"]:
            most[row["benchmark"]] = row
    return ", ".join(f"{name} {row['n']} ({row['groups']})" for name, row in most.items())


def _condition(condition: Row, picture: str | None, several: bool) -> list[str]:
    name = f": {_cell(condition['label'])}" if several else ""
    main, *others = condition["benchmarks"]
    parts = [f"## The ladder{name}"]
    if picture:
        parts.append(f"![The ladder and its differences]({picture})")
    parts.append(_ladder(condition))
    over, beside, rest = _steps(condition)
    for title, rows in (
        ("over the base", over),
        ("each entry over the one before it", beside),
        ("all other pairs", rest),
    ):
        if rows:
            parts += [f"### Differences on {main}: {title}", _differences(rows, condition["seeds"])]
    perception = [row for row in condition["differences"] if row["benchmark"] in others]
    if perception:
        table = ", ".join(
            f"{name} {100 * before:.1f} → {100 * after:.1f}"
            for name, (before, after) in PAPER_PERCEPTION.items()
        )
        parts += [
            "### Perception: over the base",
            _differences(perception, condition["seeds"], paper=False),
            f"The paper (table 2), its base → Insight-V: {table}.",
        ]
    return [*parts, *_confusion(condition), *_card(condition)]


def _steps(condition: Row) -> tuple[list[Row], list[Row], list[Row]]:
    """Differences on the main benchmark: over the base, between neighbours, all others."""
    ladder = [entry for entry in LADDER if entry in condition["entries"]]
    beside = set(zip(ladder[1:], ladder, strict=False))
    rows = [
        row for row in condition["differences"] if row["benchmark"] == condition["benchmarks"][0]
    ]
    over = [row for row in rows if row["other"] == "base"]
    step = [row for row in rows if (row["entry"], row["other"]) in beside and row not in over]
    return over, step, [row for row in rows if row not in over and row not in step]


def _ladder(condition: Row) -> str:
    main = condition["benchmarks"][0]
    cells = {(row["name"], row["benchmark"]): row for row in condition["ladder"]}
    rows = []
    for entry in condition["entries"]:
        rung = cells[entry, main]
        paper = rung["paper"] or {}
        rows.append(
            [
                entry,
                *(_accuracy(cells[entry, benchmark]) for benchmark in condition["benchmarks"]),
                *([_by_seed(rung, condition["seeds"])] if len(condition["seeds"]) > 1 else []),
                "" if rung["tokens"] is None else f"{rung['tokens']:.0f}",
                f"{rung['undecided']} / {rung['failed']}",
                _share(paper.get("chartqa")),
                _share(paper.get("average")),
            ]
        )
    by_seed = [f"{main} by seed"] if len(condition["seeds"]) > 1 else []
    head = ["entry", *condition["benchmarks"], *by_seed, "tokens", "undecided / failed"]
    return _table([*head, "paper ChartQA", "paper average"], rows)


def _differences(rows: Sequence[Row], seeds: Sequence[int], paper: bool = True) -> str:
    several = len(seeds) > 1
    lines = [
        [
            f"{row['entry']} − {row['other']}" + ("" if paper else f", {row['benchmark']}"),
            _points(row),
            _sign(row),
            *([_by_seed(row, seeds, "+.1f")] if several else []),
            *(
                _share((row["paper"] or {}).get(name), "+.1f")
                for name in ("chartqa", "average")
                if paper
            ),
        ]
        for row in rows
    ]
    head = ["difference", "points", "interval", *(["by seed"] if several else [])]
    return _table([*head, *(["paper ChartQA", "paper average"] if paper else [])], lines)


def _confusion(condition: Row) -> list[str]:
    """Reasoning × answer for every entry whose reasoning has an answer of its own."""
    if not condition["confusion"]:
        return []
    names = [
        (reasoning, answer)
        for reasoning in _OUTCOMES
        for answer in _OUTCOMES
        if any(
            f"reasoning_{reasoning}_answer_{answer}" in c for c in condition["confusion"].values()
        )
    ]
    rows = []
    for entry, counts in condition["confusion"].items():
        total = sum(counts.values())
        cells = (counts.get(f"reasoning_{one}_answer_{two}", 0) for one, two in names)
        rows.append([entry, *(f"{n} ({100 * n / total:.0f} %)" for n in cells)])
    head = ["entry", *(f"reasoning {one}, answer {two}" for one, two in names)]
    title = "### What became of right and wrong reasoning (the paper's figure 6)"
    return [title, _table(head, rows)]


def _card(condition: Row) -> list[str]:
    """The summary agent with the agent's reasoning, none, and another question's."""
    card = condition["judge_card"]
    if card is None:
        return []
    rows = []
    for mode in CARD:
        turned = [card[kind].get(mode) for kind in ("harm", "rescue")]
        rows.append(
            [
                {"agent": "the agent's", "none": "none", "other": "another question's"}[mode],
                _accuracy({"accuracy": card[mode], "ci95": card["ci95"][mode]}),
                *(f"{one['changed']} of {one['of']}" if one else "" for one in turned),
            ]
        )
    head = ["reasoning given", card["benchmark"], "harm: right → wrong", "rescue: wrong → right"]
    return ["### The judge's card", _table(head, rows)]


def _curve(curve: Row, picture: str | None) -> list[str]:
    """Accuracy against a key: a row a value, a column an entry."""
    name = f", {_cell(curve['label'])}" if curve["label"] else ""
    parts = [f"## {curve['benchmark']} by {curve['key']}{name}"]
    if picture:
        parts.append(f"![Accuracy by {curve['key']}]({picture})")
    entries = list(dict.fromkeys(point["entry"] for point in curve["points"]))
    cells = {(repr(point["value"]), point["entry"]): point for point in curve["points"]}
    ordered = sorted(curve["points"], key=lambda p: (p["x"] is None, p["x"] or 0.0))
    samples = curve["key"] == SIZE
    rows = []
    for value in dict.fromkeys(repr(point["value"]) for point in ordered):
        point = next(cells[value, entry] for entry in entries if (value, entry) in cells)
        counted = ["" if point["x"] is None else f"{point['x']:.0f}"] if samples else []
        shown = "all" if samples and point["value"] is None else str(point["value"])
        accuracies = (_accuracy(cells.get((value, entry))) for entry in entries)
        rows.append([shown, *counted, *accuracies])
    parts.append(_table([curve["key"], *(["samples"] if samples else []), *entries], rows))
    if curve["changes"]:
        lines = [
            [row["entry"], f"{_value(row['from'])} → {_value(row['to'])}", _points(row), _sign(row)]
            for row in curve["changes"]
        ]
        parts += [_table(["entry", "change", "points", "interval"], lines)]
    if curve["key"] in _PAPER:
        parts.append(_PAPER[curve["key"]])
    return parts


def _value(value: Any) -> str:
    return "all" if value is None else str(value)


def _accuracy(row: Row | None) -> str:
    """``61.2 [58.0, 64.1]``."""
    if row is None or row["accuracy"] is None:
        return "–" if row is not None else ""
    low, high = row["ci95"]
    return f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _points(row: Row) -> str:
    """``+4.1 [+1.0, +7.2]``."""
    if row["difference"] is None:
        return "–"
    low, high = row["ci95"]
    text = f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return text.replace("-", "−")


def _sign(row: Row) -> str:
    """Where the interval lies."""
    if row["ci95"] is None:
        return ""
    low, high = row["ci95"]
    return "above 0" if low > 0 else "below 0" if high < 0 else "holds 0"


def _by_seed(row: Row, seeds: Iterable[int], form: str = ".1f") -> str:
    return " ".join(_share(row["by_seed"].get(seed), form) or "–" for seed in seeds)


def _share(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else f"{100 * value:{form}}".replace("-", "−")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays text in a table: names of runs and question sets are anybody's."""
    return re.sub(r"([\\|<>`\[\]*_])", r"\\\1", text) if re.search(r"[\\|<>`*]", text) else text
