"""Figures as inline SVG, small multiples all: panels of one width that a page lays side by side.

Colours and fonts come from the page's style sheet by class, so that one drawing serves light
and dark. Text goes through `markupsafe`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 304
"""Width of a panel in its own units; a phone shows one at about this size."""

_LEFT, _RIGHT = 0, 8

Point = tuple[float, float]


@dataclass(frozen=True)
class Whisker:
    """A row of a dot plot.

    Attributes:
        label: What stands at its left.
        value: Where the dot is; None draws nothing but the label.
        low: Lower end of the interval.
        high: Upper end.
        text: The numbers in words, for the tooltip and for readers of the page's text.
        mark: A second value (the paper's), drawn as a hollow diamond.
        strong: Drawn in the accent colour.
    """

    label: str
    value: float | None
    low: float = 0.0
    high: float = 0.0
    text: str = ""
    mark: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Series:
    """A line of a line plot: its name, points (x, y), and the class that colours it."""

    name: str
    points: Sequence[Point]
    style: str = "a"


@dataclass(frozen=True)
class Bar:
    """A row of a bar plot: segments (amount, class, name) one behind the other, and its label."""

    label: str
    segments: Sequence[tuple[float, str, str]]
    text: str


def svg(body: Sequence[Markup], height: float, title: str, about: str) -> Markup:
    """A panel with its accessible name and description."""
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}. {}" preserveAspectRatio="xMidYMin">{}'
        "</svg>"
    ).format(WIDTH, round(height), title, about, Markup("").join(body))


def dots(
    title: str, rows: Sequence[Whisker], unit: str = "%", zero: bool = False, labels: float = 92
) -> Markup:
    """Dots with whiskers, one row an entry.

    Args:
        title: The panel's heading.
        rows: From top to bottom; values as fractions.
        unit: Written behind the heading.
        zero: Whether the axis shows 0 as a line (for differences).
        labels: Width kept for the labels.
    """
    values = [
        edge
        for row in rows
        if row.value is not None
        for edge in (row.low, row.value, row.high, row.mark if row.mark is not None else row.value)
    ]
    low, high = (100 * min(values), 100 * max(values)) if values else (0.0, 100.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    ticks = nice_ticks(low, high, 4)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    left, right, top, step = _LEFT + labels, WIDTH - _RIGHT, 34.0, 22.0
    bottom = top + step * len(rows)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    body = [_heading(title, unit)]
    for tick in ticks:
        body.append(_line(x(tick), top - 4, x(tick), bottom, "grid"))
        sign = "+" if zero and tick > 0 else ""
        body.append(_text(x(tick), bottom + 14, f"{sign}{number_text(tick)}", "tick middle"))
    if zero:
        body.append(_line(x(0), top - 4, x(0), bottom, "axis"))
    for number, row in enumerate(rows):
        y = top + step * (number + 0.5)
        strength = " strong" if row.strong else ""
        body.append(_text(_LEFT, y + 4, row.label, "label"))
        if row.value is None:
            body.append(_text(left, y + 4, "not yet", "tick"))
            continue
        inside = [_title(f"{row.label}: {row.text}")]
        if row.mark is not None:
            inside.append(_diamond(x(100 * row.mark), y))
        inside.append(_line(x(100 * row.low), y, x(100 * row.high), y, f"whisker{strength}"))
        inside.append(
            Markup('<circle class="dot{}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(
                strength, x(100 * row.value), y
            )
        )
        body.append(_group(inside))
    return svg(body, bottom + 20, title, "; ".join(f"{row.label} {row.text}" for row in rows))


def bars(title: str, rows: Sequence[Bar], most: float, labels: float = 92) -> Markup:
    """Horizontal bars of segments; ``most`` is the amount of a full-width bar."""
    left, right, top, step = _LEFT + labels, WIDTH - _RIGHT - 52, 28.0, 22.0
    body = [_heading(title)]
    scale = (right - left) / most if most else 0.0
    for number, row in enumerate(rows):
        y = top + step * number
        body.append(_text(_LEFT, y + 13, row.label, "label"))
        inside, x = [_title(f"{row.label}: {row.text}")], left
        for amount, style, name in row.segments:
            width = amount * scale
            inside.append(
                Markup(
                    '<rect class="fill {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="13">'
                    "<title>{}</title></rect>"
                ).format(style, x, y + 2, max(width - 0.6, 0.4 if amount else 0), name)
            )
            x += width
        inside.append(_text(x + 5, y + 13, row.text, "value"))
        body.append(_group(inside))
    about = "; ".join(f"{row.label} {row.text}" for row in rows)
    return svg(body, top + step * len(rows) + 4, title, about)


def histograms(
    title: str, low: float, high: float, counts: Mapping[str, Sequence[int]], about: str
) -> Markup:
    """Histograms laid over each other, in counts.

    Args:
        title: The panel's heading.
        low: Left end of the first bin.
        high: Right end of the last bin.
        counts: Class of the colour (``right``, ``wrong``, …) to counts in equal bins.
        about: The distributions in words.
    """
    left, right, top, bottom = _LEFT + 28, WIDTH - _RIGHT, 34.0, 150.0
    shown = {name: values for name, values in counts.items() if sum(values)}
    ticks = nice_ticks(0, max((max(values) for values in shown.values()), default=1), 3)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    def y(value: float) -> float:
        return bottom - value / ticks[-1] * (bottom - top)

    body = [_heading(title)]
    for tick in ticks:
        if tick == int(tick):
            body.append(_line(left, y(tick), right, y(tick), "grid" if tick else "axis"))
            body.append(_text(left - 6, y(tick) + 4, number_text(tick), "tick end"))
    for tick in nice_ticks(low, high, 5):
        if low <= tick <= high and tick == int(tick):
            body.append(_line(x(tick), bottom, x(tick), bottom + 4, "axis"))
            body.append(_text(x(tick), bottom + 16, number_text(tick), "tick middle"))
    for name, values in shown.items():
        width = (high - low) / len(values)
        steps = [f"M{x(low):.1f} {bottom:.1f}"]
        for number, value in enumerate(values):
            steps.append(f"V{y(value):.1f}H{x(low + (number + 1) * width):.1f}")
        steps.append(f"V{bottom:.1f}")
        body.append(Markup('<path class="step {}" d="{}"/>').format(name, "".join(steps)))
    return svg(body, bottom + 22, title, about)


def lines(title: str, series: Sequence[Series]) -> Markup:
    """Lines over steps, each named at its right end if there are several."""
    shown = [line for line in series if line.points]
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points]
    if not xs:
        return svg([_heading(title), _text(_LEFT, 40, "no numbers", "tick")], 50, title, "empty")
    ticks = nice_ticks(min(ys), max(ys), 4)
    low, high = min(min(ys), ticks[0]), max(max(ys), ticks[-1])
    first, last = min(xs), max(max(xs), min(xs) + 1)
    widest = max((len(line.name) for line in shown), default=0) if len(shown) > 1 else 0
    left, right = _LEFT + 34, WIDTH - _RIGHT - 6 * widest
    top, bottom = 34.0, 150.0

    def place(point: Point) -> Point:
        return (
            left + (point[0] - first) / (last - first) * (right - left),
            bottom - (point[1] - low) / (high - low) * (bottom - top),
        )

    body = [_heading(title)]
    for tick in ticks:
        y = place((first, tick))[1]
        body.append(_line(left, y, right, y, "grid"))
        body.append(_text(left - 6, y + 4, number_text(tick), "tick end"))
    for tick in nice_ticks(first, last, 4):
        if first <= tick <= last and tick == int(tick):
            body.append(_text(place((tick, low))[0], bottom + 16, number_text(tick), "tick middle"))
    ends = apart([place(line.points[-1])[1] for line in shown])
    for line, end in zip(shown, ends, strict=True):
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in map(place, thin(line.points)))
        body.append(Markup('<path class="line {}" d="M{}"/>').format(line.style, path))
        if len(shown) > 1:
            body.append(_text(right + 5, end + 4, line.name, f"name {line.style}"))
    about = "; ".join(
        f"{line.name} from {number_text(line.points[0][1])} to {number_text(line.points[-1][1])}"
        for line in shown
    )
    return svg(body, bottom + 22, title, about)


def scatter(title: str, points: Sequence[Point], axes: tuple[str, str], about: str) -> Markup:
    """Points on 0-100 by 0-100 with the diagonal."""
    left, top, size = _LEFT + 30, 30.0, 210.0

    def place(point: Point) -> Point:
        return left + point[0] / 100 * size, top + (1 - point[1] / 100) * size

    body = [_heading(title)]
    for tick in (0, 25, 50, 75, 100):
        x, y = place((tick, tick))
        body.append(_text(x, top + size + 15, str(tick), "tick middle"))
        body.append(_text(left - 6, y + 4, str(tick), "tick end"))
    body.append(_line(*place((0, 0)), *place((100, 100)), "grid"))
    body.append(_line(left, top + size, left + size, top + size, "axis"))
    body.append(_line(left, top, left, top + size, "axis"))
    for point in points:
        body.append(
            Markup('<circle class="speck" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(*place(point))
        )
    body.append(_text(left + size / 2, top + size + 30, axes[0], "tick middle"))
    body.append(_text(left + 6, top + 4, f"\u2191 {axes[1]}", "tick"))
    return svg(body, top + size + 36, title, about)


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that enclose or nearly enclose [low, high], some ``about`` of them."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    start = math.floor(low / step + 1e-9)
    stop = math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(start, stop + 1)]


def thin(points: Sequence[Point], most: int = 400) -> Sequence[Point]:
    """At most about ``most`` points, each the mean of its neighbours."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    chunks = (points[start : start + size] for start in range(0, len(points), size))
    return [
        (sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk))
        for chunk in chunks
    ]


def apart(heights: Sequence[float], gap: float = 13.0) -> list[float]:
    """Moves labels down until none covers another."""
    placed = list(heights)
    last = -math.inf
    for number in sorted(range(len(heights)), key=lambda number: heights[number]):
        placed[number] = last = max(heights[number], last + gap)
    return placed


def number_text(value: float) -> str:
    """Short and typographic: 0.25, 1,200, −3."""
    text = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return text.replace("-", "\u2212")


def _heading(text: str, unit: str = "") -> Markup:
    if not unit:
        return _text(_LEFT, 16, text, "heading")
    return Markup(
        '<text class="heading" x="{}" y="16">{}<tspan class="unit">, {}</tspan></text>'
    ).format(_LEFT, text, unit)


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, text)


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text)


def _group(parts: Sequence[Markup]) -> Markup:
    return Markup("<g>{}</g>").format(Markup("").join(parts))


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        style, x1, y1, x2, y2
    )


def _diamond(x: float, y: float) -> Markup:
    return Markup('<path class="paper" d="M{:.1f} {:.1f}l5 5l-5 5l-5-5z"/>').format(x, y - 5)
