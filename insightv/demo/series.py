"""Series as packages ship them, and the shapes in which they are cut from data sets."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
QUARTERS = ("Q1", "Q2", "Q3", "Q4")
# Every fifth year, and one decade in full: few distinct years, used by many tables.
YEARS = tuple(sorted({*range(1952, 2008, 5), *range(2000, 2011)} - {2001}))


@dataclass(frozen=True)
class Series:
    """A series as the package ships it, before rescaling."""

    name: str
    group: str
    points: Mapping[str, float]
    title: str
    unit: str


@dataclass(frozen=True)
class Reader:
    """Reads one source.

    Attributes:
        read: Yields its series.
        source: The package and data set.
        licence: The data set's licence as far as it is stated.
    """

    read: Callable[[], Iterator[Series]]
    source: str
    licence: str


# How each package hands out its data: as a pandas table.


def vega(name: str) -> DataFrame:
    """A data set that vega_datasets holds on disk."""
    import pandas
    from vega_datasets import data

    path = Path(getattr(data, name).filepath)
    if path.suffix == ".json":
        return pandas.DataFrame(json.loads(path.read_text()))
    return pandas.read_csv(path)


def plotly(name: str, **options: Any) -> DataFrame:
    """A data set of plotly.express.data."""
    import plotly.express

    return getattr(plotly.express.data, name)(**options)


def statsmodels(name: str) -> DataFrame:
    """A data set of statsmodels.datasets."""
    return importlib.import_module(f"statsmodels.datasets.{name}").load_pandas().data


# Shapes that recur: one column by month, a grid read both ways, means by category.


def by_month(
    group: str, dated: Iterable[tuple[str, float]], title: str, unit: str
) -> Iterator[Series]:
    """One series a year from (ISO date, value) pairs, averaged by month."""
    years: dict[str, dict[str, list[float]]] = {}
    for date, value in dated:
        month = MONTHS[int(date[5:7]) - 1]
        years.setdefault(date[:4], {}).setdefault(month, []).append(value)
    for year, months in years.items():
        means = {month: sum(values) / len(values) for month, values in months.items()}
        yield Series(f"{group}/{year}", group, means, f"{title}, {year}", unit)


def grid_both_ways(
    group: str, grid: Mapping[str, Mapping[str, float]], title: str, unit: str
) -> Iterator[Series]:
    """Each row of a grid, and each column: they share numbers, so they share the group."""
    for row, cells in grid.items():
        yield Series(f"{group}/{row}", group, cells, f"{title}, {row}", unit)
    for column in dict.fromkeys(c for cells in grid.values() for c in cells):
        cells = {row: cells[column] for row, cells in grid.items() if column in cells}
        yield Series(f"{group}/{column}", group, cells, f"{title}, {column}", unit)


def means(
    group: str, frame: DataFrame, by: str, value: str, within: Iterable[str], title: str, unit: str
) -> Iterator[Series]:
    """Means of a column by category: over all rows, and over the rows of each subset."""
    yield Series(f"{group}/all", group, frame.groupby(by, sort=False)[value].mean(), title, unit)
    for column in within:
        for key, part in frame.groupby(column):
            means = part.groupby(by, sort=False)[value].mean()
            yield Series(f"{group}/{column}={key}", group, means, f"{title} ({column} {key})", unit)


def decades(ages: Any) -> Any:
    """``30s`` for ages from 30 to 39, as a column."""
    return (ages // 10 * 10).astype(int).astype(str) + "s"
