"""Small real tables behind the charts, read at run time from packages that ship them.

A *table* is one short series: labels and whole numbers 1–40. A *group* is a set of tables
that share numbers: one metric of five countries (its years by country and its countries by
year), one month-by-month column. Splits are drawn over groups, before any chart is drawn,
so no number of a training chart reappears in a test chart.

Numbers are rescaled only by a stated step (1, 2 or 5 times a power of ten) and, where a
series is narrow, counted from a stated offset; both stand in the table's unit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from hpc.errors import UserError
from hpc.stages import Package
from insightv.demo.series import Reader
from insightv.demo.sources import READERS

LARGEST = 40
"""Values are whole numbers from 1 to this."""

INSTALL = "pip install -c constraints.txt '.[demo]', in the clone"

PACKAGES = tuple(
    Package(name, module, INSTALL)
    for name, module in (
        ("pandas", "pandas"),
        ("plotly", "plotly"),
        ("scikit-learn", "sklearn"),
        ("statsmodels", "statsmodels"),
        ("vega-datasets", "vega_datasets"),
    )
)
"""What the tables are read from."""

_SALT = "insightv-hpc charts 1"
_SHARES = (("train", 0.45), ("validation", 0.60), ("test", 1.0))  # cumulative: 45, 15, 40 %


@dataclass(frozen=True)
class Table:
    """One series that can be drawn.

    Attributes:
        name: Unique, e.g. ``gapminder/lifeExp/east-asia/JPN``.
        group: What may not be split: all tables that share numbers with this one.
        labels: Distinct short labels (1–6 characters), in the table's own order.
        values: Whole numbers 1–40, one a label.
        title: What the numbers are.
        unit: Their unit, with the step and offset they were rescaled by.
        source: The package and data set they come from.
        licence: The data set's licence as its package states it.
    """

    name: str
    group: str
    labels: tuple[str, ...]
    values: tuple[int, ...]
    title: str
    unit: str
    source: str
    licence: str


def split_of(group: str) -> str:
    """``train`` (45 %), ``validation`` (15 %) or ``test`` (40 %), by salted SHA-256."""
    digest = hashlib.sha256(f"{_SALT}\x1f{group}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return next(name for name, bound in _SHARES if place < bound)


@lru_cache
def tables() -> tuple[Table, ...]:
    """Every table, in a fixed order.

    Raises:
        UserError: A package that ships the data is not installed.
    """
    try:
        made = [table for reader in READERS for table in _read(reader)]
    except ImportError as error:
        raise UserError(f"the demo's tables need the package {error.name!r}: {INSTALL}") from None
    return tuple(made)


def vocabulary() -> list[str]:
    """All labels that occur in any table, sorted."""
    return sorted({label for table in tables() for label in table.labels})


def rescale(points: Mapping[str, float], unit: str) -> tuple[dict[str, int], str]:
    """Rounds a series to whole numbers 1–40 by a step and, if it is narrow, an offset.

    Values that round to less than 1 are left out.

    Args:
        points: Value by label; NaN means missing.
        unit: The unit of the values.

    Returns:
        The rounded values, and the unit with step and offset stated.
    """
    known = {label: float(value) for label, value in points.items() if not math.isnan(value)}
    if not known:
        return {}, unit
    low, high = min(known.values()), max(known.values())
    step, offset = _step(high / LARGEST), 0.0
    if 8 <= high <= LARGEST:
        step = 1.0  # the number itself is best
    counts = all(value.is_integer() for value in known.values())
    if low > 0 and high - low < 8 * step and not (counts and step == 1):
        # Narrow: count fine steps from a round number below the lowest.
        step = max(_step((high - low) / 24), 1.0 if counts else 0.0)
        offset = math.floor(low / step / 10 - 0.1) * 10 * step
    whole = {label: math.floor((v - offset) / step + 0.5 + 1e-9) for label, v in known.items()}
    kept = {label: value for label, value in whole.items() if 1 <= value <= LARGEST}
    scale = unit if step == 1 else f"{unit}, in units of {step:,g}"
    return kept, f"{scale}, above {offset:,g}" if offset else scale


def _step(least: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(max(least, 1e-9)))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))
    return float(f"{step:.3g}")


def _read(reader: Reader) -> Iterator[Table]:
    for series in reader.read():
        points, unit = rescale(series.points, series.unit)
        # Fewer than three marks, or nothing to compare, make no chart.
        if len(set(points.values())) >= 3:
            labels, values = tuple(points), tuple(points.values())
            where = (series.title, unit, reader.source, reader.licence)
            yield Table(series.name, series.group, labels, values, *where)
