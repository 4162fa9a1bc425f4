"""The tables behind the charts: shape, splits, honesty of the rescaled numbers."""

import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.errors import UserError
from insightv.demo import tables as module
from insightv.demo.sources import READERS
from insightv.demo.tables import LARGEST, rescale, split_of, tables, vocabulary


def test_tables_are_drawable_and_named_once():
    made = tables()
    assert len(made) >= 1500
    assert len({table.name for table in made}) == len(made)
    for table in made:
        assert len(table.labels) == len(table.values) >= 3
        assert len(set(table.labels)) == len(table.labels)
        assert all(
            1 <= len(label) <= 6 and label.isascii() and label.isalnum() for label in table.labels
        ), table
        assert all(type(value) is int and 1 <= value <= LARGEST for value in table.values), table
        assert len(set(table.values)) >= 3
        assert table.title and table.unit and table.source and table.licence


def test_vocabulary_is_small_and_closed():
    words = vocabulary()
    assert words == sorted(set(words))
    assert 100 <= len(words) <= 170
    years = {word for word in words if word.isdigit()}
    assert years and len(years) <= 20 and all(len(year) == 4 for year in years)


def test_splits_are_by_group_and_large_enough():
    groups = {table.group for table in tables()}
    sizes = Counter(split_of(group) for group in groups)
    assert set(sizes) == {"train", "validation", "test"}
    assert len(groups) >= 60 and sizes["test"] >= 25


def test_shares_of_the_splits():
    sizes = Counter(split_of(f"group {n}") for n in range(20_000))
    assert sizes["train"] / 20_000 == pytest.approx(0.45, abs=0.02)
    assert sizes["validation"] / 20_000 == pytest.approx(0.15, abs=0.02)


def test_the_split_of_a_group_never_moves():
    """A changed salt or share would silently move test tables into training."""
    assert split_of("medals") == "test"
    assert split_of("cars/count") == "train"
    assert split_of("driving/miles") == "validation"


def test_cells_read_both_ways_stay_in_one_group():
    """Years by country and countries by year hold the same numbers."""
    groups = defaultdict(set)
    for table in tables():
        if table.group.startswith(("gapminder/", "fertility/", "weather/kinds", "barley/")):
            metric = table.group.split("/")[:2] if "gapminder" in table.group else table.group
            for label in table.labels:
                cell = (str(metric), frozenset({label, table.name.rsplit("/", 1)[1]}))
                groups[cell].add(table.group)
    twice = [cell for cell, names in groups.items() if len(names) > 1]
    assert groups and not twice


def test_numbers_agree_with_the_package():
    pytest.importorskip("plotly")
    import plotly.express as px

    frame = px.data.gapminder()
    by_name = {table.name: table for table in tables()}
    table = by_name["gapminder/pop/west-asia/SAU"]
    people = frame[frame["country"] == "Saudi Arabia"].set_index("year")["pop"]
    assert table.unit == "million people"
    for label, value in zip(table.labels, table.values, strict=True):
        assert value == math.floor(people[int(label)] / 1e6 + 0.5)
    korea = by_name["gapminder/lifeExp/east-asia/KOR"]
    years = frame[frame["country"] == "Korea, Rep."].set_index("year")["lifeExp"]
    scale, offset = _scale(korea.unit)
    for label, value in zip(korea.labels, korea.values, strict=True):
        assert abs(value * scale + offset - years[int(label)]) <= scale / 2 + 1e-6


def _scale(unit: str) -> tuple[float, float]:
    """Step and offset as a unit states them."""
    step = unit.split("in units of ")[1].split(", above")[0] if "in units of" in unit else "1"
    offset = unit.split(", above ")[1] if ", above " in unit else "0"
    return float(step.replace(",", "")), float(offset.replace(",", ""))


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=4),
        st.floats(0.01, 1e7) | st.integers(1, 10**6).map(float),
        min_size=1,
        max_size=12,
    )
)
def test_rescaled_values_can_be_undone_by_the_unit(points):
    values, unit = rescale(points, "apples")
    assert unit.startswith("apples")
    step, offset = _scale(unit)
    for label, value in values.items():
        assert 1 <= value <= LARGEST
        slack = 1e-5 * max(1.0, offset)  # the unit's text is rounded to six digits
        assert abs(value * step + offset - points[label]) <= step * 0.5001 + slack
    if len(points) == len(values) and len(points) > 1 and max(points.values()) > 40:
        spread = max(points.values()) - min(points.values())
        assert spread < 8 * step or len(set(values.values())) > 1


def test_rescaling_leaves_out_what_has_no_place():
    values, _ = rescale({"a": float("nan"), "b": -3.0, "c": 0.2, "d": 20.0, "e": 30.0}, "x")
    assert values == {"d": 20, "e": 30}
    assert rescale({"a": float("nan")}, "x") == ({}, "x")


def test_small_counts_stay_counts():
    assert rescale({"a": 11.0, "b": 8.0, "c": 12.0}, "medals") == (
        {"a": 11, "b": 8, "c": 12},
        "medals",
    )


def test_a_missing_package_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "vega_datasets", None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt '\.\[demo\]'"):
        module.tables.__wrapped__()


def test_every_source_is_listed_with_its_licence():
    listing = Path(module.__file__).with_name("SOURCES.md").read_text()
    for reader in READERS:
        package, names = reader.source.split(" ", 1)
        assert package in listing
        for name in names.replace("vega_datasets ", "").split(", "):
            assert f"`{name}`" in listing, name
