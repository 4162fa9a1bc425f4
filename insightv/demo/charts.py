"""Draws small charts: a handful of labelled whole numbers, in several kinds and styles.

The pictures are 128 × 128 pixels. Values are drawn to scale; in about half of the
charts they are also printed, in the others they must be read off the axis.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

SIZE = 128
"""Width and height of a chart in pixels."""
KINDS = ("bar", "hbar", "line", "lollipop", "table")
LARGEST = 40
"""Largest value a chart can show."""
_AXES = (10, 20, 30, 40)
_INKS = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (100, 100, 100), (160, 160, 20), (23, 170, 190),
)  # fmt: skip
_PAPERS = ((255, 255, 255), (255, 255, 255), (248, 246, 240), (240, 244, 250), (236, 236, 236))


@dataclass(frozen=True)
class Style:
    """Everything about a chart's look that does not change what it says."""

    kind: str
    axis: int
    printed: bool
    paper: tuple[int, int, int]
    inks: tuple[tuple[int, int, int], ...]
    width: float
    shift: int
    font: int
    grid: bool


@dataclass(frozen=True)
class Chart:
    """Labels with their values, and the style they are drawn in."""

    labels: tuple[str, ...]
    values: tuple[int, ...]
    style: Style

    @property
    def table(self) -> dict[str, int]:
        """Value by label, in drawing order."""
        return dict(zip(self.labels, self.values, strict=True))


@dataclass(frozen=True)
class _Frame:
    """Plot area in pixels: left, top, right, bottom."""

    left: int
    top: int
    right: int
    bottom: int


def make_chart(
    rng: random.Random,
    labels: tuple[str, ...],
    values: tuple[int, ...],
    kinds: tuple[str, ...] = KINDS,
) -> Chart:
    """Chooses a style at random, among the kinds in which the labels fit.

    Args:
        rng: Source of every choice.
        labels: 3 to 6 distinct labels of at most 6 characters.
        values: As many whole numbers from 1 to 40.
        kinds: The kinds to choose from; where the labels fit in none of them, a table is drawn.
    """
    font = rng.choice((9, 9, 10))
    widest = max(_glyph(label, font).width for label in labels)
    slot = (SIZE - 23) / len(labels)
    fitting = [kind for kind in kinds if kind in ("hbar", "table") or widest + 2 <= slot]
    axes = [axis for axis in _AXES if axis >= max(values)]
    axis = axes[0] if rng.random() < 0.7 else rng.choice(axes)
    if rng.random() < 0.4:
        inks = (rng.choice(_INKS),) * len(labels)
    else:
        inks = tuple(rng.sample(_INKS, len(labels)))
    style = Style(
        kind=rng.choice(fitting or ["table"]),
        axis=axis,
        printed=rng.random() < 0.5,
        paper=rng.choice(_PAPERS),
        inks=inks,
        width=rng.uniform(0.5, 0.8),
        shift=rng.randint(0, 4),
        font=font,
        grid=rng.random() < 0.7,
    )
    return Chart(labels, values, style)


def draw(chart: Chart) -> Image.Image:
    """The chart as an RGB picture of ``SIZE`` × ``SIZE`` pixels."""
    image = Image.new("RGB", (SIZE, SIZE), chart.style.paper)
    pen = ImageDraw.Draw(image)
    if chart.style.kind == "table":
        _draw_table(image, pen, chart)
    elif chart.style.kind == "hbar":
        _draw_rows(image, pen, chart)
    else:
        _draw_columns(image, pen, chart)
    return image


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes of a picture; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mark_of_patch(chart: Chart, patches: int) -> list[list[int]]:
    """Which mark each patch of the picture belongs to (-1: none).

    Args:
        chart: The chart.
        patches: Patches along each side.

    Returns:
        ``patches`` rows of ``patches`` mark numbers: the column or row of the chart that
        the patch's centre lies in. Used by the dense loss of pretraining only.
    """
    size = SIZE / patches
    frame, count = _frame(chart), len(chart.labels)
    centres = [(k + 0.5) * size for k in range(patches)]
    if chart.style.kind in ("hbar", "table"):
        column = [_slot(y, frame.top, frame.bottom, count) for y in centres]
        return [[mark] * patches for mark in column]
    row = [_slot(x, frame.left, frame.right, count) for x in centres]
    return [row] * patches


def _slot(position: float, start: int, end: int, count: int) -> int:
    if position < start or position > end:
        return -1
    return min(count - 1, int((position - start) / (end - start) * count))


def _frame(chart: Chart) -> _Frame:
    style = chart.style
    if style.kind == "table":
        row = 18 if len(chart.labels) <= 5 else 17
        return _Frame(
            6 + style.shift, 8 + style.shift, 120, 8 + style.shift + row * len(chart.labels)
        )
    if style.kind == "hbar":
        widest = max(_glyph(label, style.font).width for label in chart.labels)
        return _Frame(int(widest) + 5, 4 + style.shift, SIZE - 14, SIZE - 14)
    return _Frame(17 + style.shift, 15, SIZE - 2, SIZE - 15)


def _draw_columns(image: Image.Image, pen: ImageDraw.ImageDraw, chart: Chart) -> None:
    """Bars, lollipops, or a line with markers over a category axis."""
    style, frame = chart.style, _frame(chart)
    height, slot = frame.bottom - frame.top, (frame.right - frame.left) / len(chart.labels)
    for k in range(5):
        level = round(frame.bottom - height * k / 4)
        if style.grid and k:
            pen.line((frame.left, level, frame.right, level), fill=(210, 210, 210))
        if k % 2 == 0:
            text = _glyph(str(style.axis * k // 4), style.font - 1)
            left, top = frame.left - 3 - text.width, level - text.height // 2
            _print(image, text, left, top, (90, 90, 90))
    pen.line((frame.left, frame.bottom, frame.right, frame.bottom), fill=(0, 0, 0))
    pen.line((frame.left, frame.top, frame.left, frame.bottom), fill=(0, 0, 0))
    centres = [frame.left + slot * (k + 0.5) for k in range(len(chart.labels))]
    tops = [frame.bottom - height * value / style.axis for value in chart.values]
    if style.kind == "line":
        pen.line(list(zip(centres, tops, strict=True)), fill=style.inks[0], width=2)
    for x, y, ink, label, value in zip(
        centres, tops, style.inks, chart.labels, chart.values, strict=True
    ):
        half = slot * style.width / 2
        if style.kind == "bar":
            pen.rectangle((round(x - half), round(y), round(x + half), frame.bottom - 1), fill=ink)
        elif style.kind == "lollipop":
            pen.line((x, y, x, frame.bottom - 1), fill=ink, width=2)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
        else:
            pen.rectangle((x - 2, y - 2, x + 2, y + 2), fill=style.inks[0])
        text = _glyph(label, style.font)
        _print(image, text, round(x - text.width / 2), frame.bottom + 3, (0, 0, 0))
        if style.printed:
            text = _glyph(str(value), style.font)
            left, top = round(x - text.width / 2), round(y) - text.height - 5
            if style.kind == "line":  # the line must not run through the number
                box = (left - 1, top - 1, left + text.width, top + text.height)
                pen.rectangle(box, fill=style.paper)
            _print(image, text, left, top, (0, 0, 0))


def _draw_rows(image: Image.Image, pen: ImageDraw.ImageDraw, chart: Chart) -> None:
    """Horizontal bars."""
    style, frame = chart.style, _frame(chart)
    width, slot = frame.right - frame.left, (frame.bottom - frame.top) / len(chart.labels)
    for k in range(5):
        x = round(frame.left + width * k / 4)
        if style.grid and k:
            pen.line((x, frame.top, x, frame.bottom), fill=(210, 210, 210))
        if k % 2 == 0:
            text = _glyph(str(style.axis * k // 4), style.font - 1)
            _print(image, text, x - text.width // 2, frame.bottom + 3, (90, 90, 90))
    pen.line((frame.left, frame.top, frame.left, frame.bottom), fill=(0, 0, 0))
    pen.line((frame.left, frame.bottom, frame.right, frame.bottom), fill=(0, 0, 0))
    for k, (ink, label, value) in enumerate(
        zip(style.inks, chart.labels, chart.values, strict=True)
    ):
        y, end = frame.top + slot * (k + 0.5), frame.left + width * value / style.axis
        half = slot * style.width / 2
        pen.rectangle((frame.left + 1, round(y - half), round(end), round(y + half)), fill=ink)
        text = _glyph(label, style.font)
        _print(image, text, frame.left - 3 - text.width, round(y - text.height / 2), (0, 0, 0))
        if style.printed:
            text = _glyph(str(value), style.font)
            _print(image, text, round(end) + 2, round(y - text.height / 2), (0, 0, 0))


def _draw_table(image: Image.Image, pen: ImageDraw.ImageDraw, chart: Chart) -> None:
    """A ruled table of two columns; the values are always printed."""
    style, frame = chart.style, _frame(chart)
    row, middle = (frame.bottom - frame.top) / len(chart.labels), 66
    for k, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
        y = frame.top + row * k
        if style.grid and k % 2 == 0:
            pen.rectangle((frame.left, y, frame.right, y + row), fill=(226, 230, 236))
        text = _glyph(label, style.font)
        _print(image, text, frame.left + 5, round(y + (row - text.height) / 2), (0, 0, 0))
        text = _glyph(str(value), style.font)
        _print(image, text, middle + 14, round(y + (row - text.height) / 2), (0, 0, 0))
    for k in range(len(chart.labels) + 1):
        y = round(frame.top + row * k)
        pen.line((frame.left, y, frame.right, y), fill=(120, 120, 120))
    for x in (frame.left, middle, frame.right):
        pen.line((x, frame.top, x, frame.bottom), fill=(120, 120, 120))


def _print(
    image: Image.Image, text: Image.Image, x: int, y: int, ink: tuple[int, int, int]
) -> None:
    image.paste(ink, (max(0, x), max(0, y)), text)


@lru_cache(maxsize=4096)
def _glyph(text: str, size: int) -> Image.Image:
    """A word as a mask, cached: drawing text is most of a chart's cost."""
    font = ImageFont.load_default(size=size)
    left, top, right, bottom = (int(round(edge)) for edge in font.getbbox(text))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)), 0)
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font)
    return mask
