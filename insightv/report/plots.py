"""Plots that stand alone: an SVG file each, with the page's style inside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from insightv.report.drawings import AGENTS
from insightv.report.figures import WIDTH, apart, nice_ticks, number_text

_STYLE = Path(__file__).parent / "templates" / "style.css"
_GAP = 24
_ACROSS = 3

# Okabe and Ito's palette, told apart by colour-blind readers too; the paler two left out.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b07c00", "#6b665e")
_DASHES = ("", "5 3", "1.5 2.5")


@dataclass(frozen=True)
class Line:
    """One line of a curve plot.

    Attributes:
        name: Written at its right end.
        points: (x, value, low, high) in the order of x; values as fractions.
        specks: (x, value) of single seeds.
        strong: Drawn thicker.
    """

    name: str
    points: Sequence[tuple[float, float, float, float]]
    specks: Sequence[tuple[float, float]] = ()
    strong: bool = False


def side_by_side(panels: Sequence[Markup]) -> str:
    """Panels of the page as one file, three in a row.

    Args:
        panels: SVG elements as `insightv.report.figures` draws them.
    """
    placed: list[Markup] = []
    top = 0.0
    for start in range(0, len(panels), _ACROSS):
        height = 0.0
        for column, panel in enumerate(panels[start : start + _ACROSS]):
            box = re.match(r'<svg viewBox="0 0 \d+ (\d+)"', panel)
            tall = float(box[1]) if box else 0.0
            height = max(height, tall)
            place = f'<svg x="{column * (WIDTH + _GAP)}" y="{top:.0f}" '
            size = f'width="{WIDTH}" height="{tall:.0f}" '
            placed.append(Markup(place + size) + Markup(panel.removeprefix("<svg ")))
        top += height + _GAP
    across = min(len(panels), _ACROSS)
    return _file(Markup("").join(placed), across * (WIDTH + _GAP) - _GAP, top - _GAP)


def curves(title: str, axis: str, lines: Sequence[Line]) -> str:
    """Accuracy against a number: a line an entry, seeds as points, intervals as bands.

    Args:
        title: The heading.
        axis: What stands below.
        lines: At least one, with at least one point.
    """
    width, left, top, bottom = 640.0, 40.0, 40.0, 330.0
    right = width - 16 - 6.2 * max(len(line.name) for line in lines)
    xs = sorted({point[0] for line in lines for point in line.points})
    ends = [end for line in lines for point in line.points for end in point[2:]]
    ends += [value for line in lines for _, value in line.specks]
    ticks = nice_ticks(100 * min(ends), 100 * max(ends), 6)
    first, last = xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1

    def x(value: float) -> float:
        return left + 8 + (value - first) / (last - first) * (right - left - 16)

    def y(value: float) -> float:
        return bottom - (100 * value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    body = [
        Markup(
            '<text class="heading" x="0" y="16">{}<tspan class="unit">, %</tspan></text>'
        ).format(title)
    ]
    for tick in ticks:
        at = y(tick / 100)
        body.append(
            Markup(
                '<line class="grid" x1="{0}" y1="{2:.1f}" x2="{1:.1f}" y2="{2:.1f}"/>'
                '<text class="tick end" x="{3}" y="{4:.1f}">{5}</text>'
            ).format(left, right, at, left - 6, at + 4, number_text(tick))
        )
    free = -float("inf")
    for value in xs:
        body.append(
            Markup('<line class="axis" x1="{0:.1f}" y1="{1}" x2="{0:.1f}" y2="{2}"/>').format(
                x(value), bottom, bottom + 4
            )
        )
        if x(value) >= free:  # a label that would cover its neighbour is left out
            label = number_text(round(value, 1))
            free = x(value) + 6.0 * len(label) + 6
            body.append(_label(x(value), bottom + 16, label, "tick middle"))
    body.append(_label((left + right) / 2, bottom + 34, axis, "tick middle"))
    heights = apart([y(line.points[-1][1]) for line in lines])
    drawn = zip(lines, heights, strict=True)
    body += [_line(number, line, x, y, right, end) for number, (line, end) in enumerate(drawn)]
    return _file(Markup("").join(body), width, max(bottom + 42, max(heights) + 12))


def _line(number: int, line: Line, x: Any, y: Any, right: float, end: float) -> Markup:
    """Band, line, points of seeds and name of one entry."""
    colour = _COLOURS[number % len(_COLOURS)]
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    upper = [f"{x(at):.1f} {y(high):.1f}" for at, _, _, high in line.points]
    lower = [f"{x(at):.1f} {y(low):.1f}" for at, _, low, _ in reversed(line.points)]
    middle = [f"{x(at):.1f} {y(value):.1f}" for at, value, _, _ in line.points]
    parts = [
        Markup(
            '<path fill="{0}" fill-opacity="0.10" stroke="{0}" stroke-opacity="0.25" d="M{1}Z"/>'
        ).format(colour, "L".join([*upper, *lower])),
        Markup(
            '<path fill="none" stroke="{}" stroke-width="{}" stroke-dasharray="{}" d="M{}"/>'
        ).format(colour, 2.4 if line.strong else 1.5, dash, "L".join(middle)),
        *(
            Markup('<circle fill="{}" cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(
                colour, x(at), y(value)
            )
            for at, value in line.specks
        ),
        Markup('<text style="fill:{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
            colour, right + 8, end + 4, line.name
        ),
    ]
    return Markup("<g><title>{}</title>{}</g>").format(_said(line), Markup("").join(parts))


def lines_of(curve: Mapping[str, Any]) -> list[Line]:
    """The lines of a comparison's curve; values that are no number have no place on it."""
    lines = []
    for entry in dict.fromkeys(point["entry"] for point in curve["points"]):
        rows = [
            row
            for row in curve["points"]
            if row["entry"] == entry and row["x"] is not None and row["accuracy"] is not None
        ]
        points = [(row["x"], row["accuracy"], *row["ci95"]) for row in rows]
        specks = [
            (row["x"], value)
            for row in rows
            if len(row["by_seed"]) > 1
            for value in row["by_seed"].values()
            if value is not None
        ]
        if points:
            lines.append(Line(entry, points, specks, entry in AGENTS))
    return lines


def _said(line: Line) -> str:
    values = ", ".join(f"{100 * value:.1f} at {number_text(at)}" for at, value, _, _ in line.points)
    return f"{line.name}: {values}"


def _label(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, text)


def _file(body: Markup, width: float, height: float) -> str:
    """A whole file: the page's colours and the rules of its drawings, on its paper."""
    rules = _STYLE.read_text()
    colours = re.findall(r":root \{[^}]*\}", rules)[0]
    drawing = "\n".join(re.findall(r"^svg [.t][^{]*\{[^}]*\}", rules, re.M))
    margin = 12
    box = f"{-margin} {-margin} {width + 2 * margin:.0f} {height + 2 * margin:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" '
        f'width="{width + 2 * margin:.0f}" height="{height + 2 * margin:.0f}">'
        f"<style>{escape(colours)}\n{escape(drawing)}</style>"
        f'<rect x="{-margin}" y="{-margin}" width="100%" height="100%" fill="var(--paper)"/>'
        f"{body}</svg>\n"
    )
