"""The page's figures, drawn from ``results.json``: which numbers go into which panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from insightv.evaluation.results import CARD, Results
from insightv.report import figures
from insightv.report.figures import Bar, Series, Whisker

AGENTS = ("multi_agent", "dpo", "iterative_dpo")
"""Entries in which two agents answer; drawn in the accent colour."""

STEPS = (
    ("base_reasoning", "base"),
    ("direct_sft", "base_reasoning"),
    ("multi_turn", "direct_sft"),
    ("multi_agent", "direct_sft"),
    ("multi_agent", "multi_turn"),
    ("multi_agent", "summary_only"),
    ("dpo", "multi_agent"),
    ("iterative_dpo", "multi_agent"),
    ("iterative_dpo", "dpo"),
)
"""The comparisons the ladder is made for; all others stand in the table."""

_NAMES = {
    "tokens": "Length, tokens",
    "steps": "Length, steps",
    "total": "Score, overall",
    "logic": "Score, logic",
    "grounding": "Score, grounding",
    "completeness": "Score, completeness",
}

_FLAT = 0.9
"""A histogram with a larger share of its paths in one bar is folded away."""

_CURVES: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    ("Loss", (("loss", "loss", "a"),)),
    (
        "Implicit reward",
        (("reward_chosen", "chosen", "right"), ("reward_rejected", "rejected", "wrong")),
    ),
    ("Reward margin", (("margin", "margin", "a"),)),
    ("Pairs ordered rightly", (("accuracy", "share", "a"),)),
    (
        "Log-probability, nats a reply",
        (("logp_chosen", "chosen", "right"), ("logp_rejected", "rejected", "wrong")),
    ),
)


def ladder(results: Results) -> list[Markup]:
    """A panel a benchmark: every entry's accuracy with its interval."""
    return [
        figures.dots(
            benchmark,
            [
                _whisker(row["name"], row["accuracy"], row["ci95"], row["name"] in AGENTS)
                for row in results["ladder"]
                if row["benchmark"] == benchmark
            ],
        )
        for benchmark in results["benchmarks"]
        if results["ladder"]
    ]


def differences(results: Results) -> list[Markup]:
    """Paired differences: over the base, step by step, and what became of perception."""
    if not results["benchmarks"]:
        return []
    main, *others = results["benchmarks"]
    known = {(row["entry"], row["other"], row["benchmark"]): row for row in results["differences"]}

    def rows(wanted: Sequence[tuple[str, str, str, str]]) -> list[Whisker]:
        return [
            _whisker(
                label,
                row["difference"],
                row["ci95"],
                entry in AGENTS,
                (row["paper"] or {}).get("chartqa"),
                signed=True,
            )
            for label, entry, other, benchmark in wanted
            if (row := known.get((entry, other, benchmark)))
        ]

    present = dict.fromkeys(row["name"] for row in results["ladder"])
    last = [entry for entry in AGENTS if entry in present]
    panels = (
        (f"{main}: over the base", [(name, name, "base", main) for name in present], 92),
        (
            f"{main}: between entries",
            [(f"{_short(a)} − {_short(b)}", a, b, main) for a, b in STEPS],
            128,
        ),
        (
            "perception: over the base",
            [
                (f"{benchmark}, {_short(entry)}", entry, "base", benchmark)
                for benchmark in others
                for entry in last
            ],
            112,
        ),
    )
    return [
        figures.dots(title, found, "points", zero=True, labels=labels)
        for title, wanted, labels in panels
        if (found := rows(wanted))
    ]


def card(results: Results) -> Markup | None:
    """Accuracy of the summary agent by whose reasoning it is given."""
    known = results["judge_card"]
    if known is None:
        return None
    names = {
        "agent": "the agent's",
        "none": "none",
        "other": "another question's",
    }
    rows = [
        _whisker(names[mode], known[mode], known["ci95"][mode], mode == "agent")
        for mode in CARD
        if mode in known
    ]
    return figures.dots(f"{known['benchmark']}: reasoning given", rows, labels=112)


def funnel(results: Results) -> list[Markup]:
    """A panel a round: from questions to pairs."""
    rounds = results["funnel"]["rounds"]
    most = max((row["paths"] + row["failed_paths"] for row in rounds), default=0)
    return [_funnel(row, most) for row in rounds]


def _funnel(row: Mapping[str, Any], most: int) -> Markup:
    def one(label: str, amount: int | None, style: str = "plain") -> Bar:
        if amount is None:
            return Bar(label, (), "not yet")
        return Bar(label, ((amount, style, f"{label}: {amount:,}"),), f"{amount:,}")

    bars = [
        one("questions", row["questions"] + row["failed_questions"]),
        one("paths", row["paths"] + row["failed_paths"]),
        one("parsed", row["paths"]),
        one("finished", row["finish"].get("summary", 0)),
        one("answered", row["answered"]),
    ]
    if (verdicts := row["verdicts"]) is not None:
        segments = [(verdicts[name], name, f"{name}: {verdicts[name]:,}") for name in verdicts]
        shown = verdicts["right"] / (sum(verdicts.values()) or 1)
        bars.append(Bar("judged", segments, f"{100 * shown:.0f} % right"))
    else:
        bars.append(one("judged", None))
    bars.append(one("scored", row["scored"]))
    for name in ("reasoning", "summary"):
        if name in row["kept"]:
            bars.append(one(f"{name} set", row["kept"][name], "accent"))
    if row["pairs"] is not None:
        bars.append(one("pairs", row["pairs"], "accent"))
    return figures.bars(row["name"], bars, most)


@dataclass(frozen=True)
class Distributions:
    """A round's histograms.

    Attributes:
        name: The round's.
        panels: Those that show how a measure is spread.
        flat: Those of scores of which nearly all stand in one bar.
        told: What there is to say of the flat ones.
    """

    name: str
    panels: list[Markup]
    flat: list[Markup]
    told: str


def distributions(results: Results) -> list[Distributions]:
    """For each round: lengths and scores, right paths against wrong ones."""
    shown = []
    for row in results["funnel"]["rounds"]:
        panels: list[Markup] = []
        flat: list[Markup] = []
        told = []
        for measure, found in row["distributions"].items():
            groups = {
                name: found[name] for name in ("right", "wrong", "undecided") if found[name]["n"]
            }
            about = "; ".join(
                f"{name}: {part['n']:,} paths, mean {part['mean']:.1f}"
                for name, part in groups.items()
            )
            counts = {name: part["counts"] for name, part in groups.items()}
            low, high = found["low"], found["high"]
            panel = figures.histograms(_NAMES[measure], low, high, counts, about)
            bars = [sum(bar) for bar in zip(*counts.values(), strict=True)]
            if _NAMES[measure].startswith("Score") and max(bars) > _FLAT * sum(bars):
                flat.append(panel)
                share, place = 100 * max(bars) / sum(bars), bars.index(max(bars))
                width = (high - low) / len(bars)
                span = f"{low + place * width:.0f}–{low + (place + 1) * width:.0f}"
                told.append(f"{_NAMES[measure][7:]} {share:.1f} % at {span}")
            else:
                panels.append(panel)
        if panels or flat:
            shown.append(Distributions(row["name"], panels, flat, ", ".join(told)))
    return shown


def agreement(results: Results) -> list[tuple[str, Mapping[str, Any], Markup]]:
    """For each round that was scored twice: first score against second."""
    shown = []
    for row in results["funnel"]["rounds"]:
        if found := row["agreement"]:
            about = f"{found['n']} paths scored twice"
            axes = ("first scoring", "second")
            panel = figures.scatter(row["name"], found["points"], axes, about)
            shown.append((row["name"], found, panel))
    return shown


def curves(stage: str, rows: Sequence[Mapping[str, float]]) -> list[Markup]:
    """A training's panels: its loss, headed by the stage, and for preferences its rewards."""
    panels = []
    for name, columns in _CURVES:
        title = f"{stage}: {name.lower()}" if name == "Loss" else name
        series = [
            Series(
                label,
                [(row.get("step", n), row[column]) for n, row in enumerate(rows) if column in row],
                style,
            )
            for column, label, style in columns
        ]
        if any(line.points for line in series):
            panels.append(figures.lines(title, series))
    return panels


def _short(entry: str) -> str:
    """Entries of the ladder by a name that fits beside a figure."""
    return {"iterative_dpo": "iterative", "base_reasoning": "base reas."}.get(entry, entry)


def _whisker(
    label: str,
    value: float | None,
    interval: Sequence[float] | None,
    strong: bool,
    mark: float | None = None,
    signed: bool = False,
) -> Whisker:
    if value is None or interval is None:
        return Whisker(label, None, text="no decided question", strong=strong)
    low, high = interval
    form = "+.1f" if signed else ".1f"
    text = f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]"
    if mark is not None:
        text += f", paper {100 * mark:{form}}"
    return Whisker(label, value, low, high, text.replace("-", "\u2212"), mark, strong)
