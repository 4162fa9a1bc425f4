"""Runs beside each other: intervals that are known, refusals, sizes and rounds."""

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import runs

from hpc.config import dump
from hpc.errors import UserError
from hpc.rundir import RunDir
from insightv.chainfile import read
from insightv.evaluation.comparison import compare
from insightv.evaluation.results import eval_stage
from insightv.records import Prediction, Question
from insightv.report.comparison import write_comparison

QUICKSTART = Path(__file__).parents[2] / "configs" / "chain" / "quickstart.yaml"
TABLES, PER_TABLE = 100, 5


def prediction(key: str, entry: str, correct: bool | None) -> Prediction:
    return Prediction(
        f"{key}@{entry}", key, entry, "", "", "1", correct, None, "number", 10, ("m",)
    )


def make(path: Path, right: dict, *overrides: str, kept: int | None = None, groups="t") -> Path:
    """A run whose entries are right where a function of (table, question) says so."""
    entries = f"evaluation.entries=[{','.join(right)}]"
    run = RunDir(path)
    run.create()
    run.chain_file.write_text(dump(read(QUICKSTART, [entries, *overrides])))
    questions = [
        Question(f"charts:test:{n}", "?", (), "1", "number", group=f"{groups}{n // PER_TABLE}")
        for n in range(TABLES * PER_TABLE)
    ]
    runs.commit(path, "questions-test", runs.group(questions))
    for entry, function in right.items():
        rows = [
            prediction(one.key, entry, function(n // PER_TABLE, n % PER_TABLE))
            for n, one in enumerate(questions)
        ]
        runs.commit(path, eval_stage(entry), runs.group(rows))
    if kept is not None:
        runs.commit(path, "set-reasoning", [], {"kept": kept})
    return path


def tables_below(limit: int):
    """Whole tables right or wrong, so that tables, not questions, are what varies."""
    return lambda table, place: table < limit


def row(rows, **named):
    return next(one for one in rows if all(one[name] == value for name, value in named.items()))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Three seeds, by hand: base right in 50 tables of 100; the agents in 60, 60 and 75."""
    folder = tmp_path_factory.mktemp("seeds")
    return [
        make(
            folder / f"run-{seed}",
            {"base": tables_below(50), "multi_agent": tables_below(limit)},
            f"seed={seed}",
        )
        for seed, limit in enumerate((60, 60, 75))
    ]


def test_seeds_are_pooled_and_tables_resampled_with_all_of_them(seeds):
    (condition,) = compare(seeds)["conditions"]
    base = row(condition["ladder"], name="base")
    assert (base["accuracy"], base["n"], base["groups"]) == (0.5, 1500, TABLES)
    # Three seeds that agree and five questions that agree weigh as one table: √(p q / tables).
    half = 1.96 * math.sqrt(0.25 / TABLES)
    assert base["ci95"] == pytest.approx([0.5 - half, 0.5 + half], abs=0.011)
    agents = row(condition["ladder"], name="multi_agent")
    assert agents["accuracy"] == pytest.approx((0.60 + 0.60 + 0.75) / 3)
    assert agents["by_seed"] == {0: 0.6, 1: 0.6, 2: 0.75}


def test_a_paired_difference_has_the_spread_of_the_tables_means(seeds):
    (condition,) = compare(seeds)["conditions"]
    gain = row(condition["differences"], entry="multi_agent", other="base")
    # By table: 10 gain in all three seeds, 15 in one, 75 in none.
    means = [1.0] * 10 + [1 / 3] * 15 + [0.0] * 75
    mean = sum(means) / TABLES
    half = 1.96 * math.sqrt(sum((m - mean) ** 2 for m in means) / TABLES / TABLES)
    assert gain["difference"] == pytest.approx(0.15)
    assert gain["ci95"] == pytest.approx([mean - half, mean + half], abs=0.011)
    assert gain["by_seed"] == pytest.approx({0: 0.1, 1: 0.1, 2: 0.25})
    assert gain["paper"] == {"average": 0.029, "chartqa": 0.055}


def test_undecided_answers_are_counted_and_not_wrong(tmp_path):
    def unsure(table: int, place: int) -> bool | None:
        return None if place == 0 else table < 50

    path = make(tmp_path / "run", {"base": unsure, "multi_agent": tables_below(60)})
    (condition,) = compare([path])["conditions"]
    base = row(condition["ladder"], name="base")
    assert (base["accuracy"], base["n"], base["undecided"]) == (0.5, 400, 100)
    assert row(condition["differences"], entry="multi_agent")["n"] == 400


def test_entries_may_differ_between_the_seeds_of_a_condition(tmp_path):
    both = make(tmp_path / "a", {"base": tables_below(50), "multi_agent": tables_below(60)})
    one = make(tmp_path / "b", {"base": tables_below(40)}, "seed=1")
    (condition,) = compare([both, one])["conditions"]
    assert row(condition["ladder"], name="base")["by_seed"] == {0: 0.5, 1: 0.4}
    gain = row(condition["differences"], entry="multi_agent", other="base")
    assert gain["by_seed"] == {0: pytest.approx(0.1)}


def test_sizes_become_a_curve_at_the_samples_they_came_to(tmp_path):
    paths = [
        make(
            tmp_path / f"{size}-{seed}",
            {"base": tables_below(50), "multi_agent": tables_below(limit + seed)},
            f"seed={seed}",
            f"reasoning_set.size={size}",
            kept=kept + seed,
        )
        for size, limit, kept in (("null", 80, 900), (200, 52, 200), (400, 60, 400))
        for seed in (0, 1)
    ]
    comparison = compare(paths)
    assert [one["label"] for one in comparison["conditions"]] == [
        f"reasoning_set.size={size}" for size in ("all", 200, 400)
    ]
    (curve,) = comparison["curves"]
    assert (curve["key"], curve["benchmark"]) == ("reasoning_set.size", "charts")
    line = [point for point in curve["points"] if point["entry"] == "multi_agent"]
    assert [(point["value"], point["x"]) for point in line] == [
        (200, 200.5),
        (400, 400.5),
        (None, 900.5),
    ]
    assert [point["accuracy"] for point in line] == pytest.approx([0.525, 0.605, 0.805])
    change = row(curve["changes"], entry="multi_agent")
    assert (change["from"], change["to"]) == (200, None)
    assert change["difference"] == pytest.approx(0.28) and change["ci95"][0] > 0
    text = write_comparison(comparison, tmp_path / "docs" / "r.md", tmp_path / "docs" / "plots")
    assert "| all | 900 |" in text and "200 → all | +28.0" in text
    assert "](plots/reasoning-set-size.svg)" in text
    for plot in (tmp_path / "docs" / "plots").glob("*.svg"):
        ET.parse(plot)
    drawn = ET.parse(tmp_path / "docs" / "plots" / "reasoning-set-size.svg")
    circles = drawn.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2 * 3 * 2  # entries, sizes, seeds


def test_rounds_begin_with_the_agents_before_any(tmp_path):
    paths = [
        make(
            tmp_path / str(count),
            {"multi_agent": tables_below(60), "iterative_dpo": tables_below(60 + 5 * count)},
            f"rounds.count={count}",
        )
        for count in (1, 2, 3)
    ]
    (curve,) = compare(paths)["curves"]
    line = [point for point in curve["points"] if point["entry"] == "iterative_dpo"]
    assert [point["x"] for point in line] == [0, 1, 2, 3]
    assert [point["accuracy"] for point in line] == pytest.approx([0.6, 0.65, 0.7, 0.75])


def test_what_cannot_be_pooled_is_refused(seeds, tmp_path):
    twin = make(tmp_path / "twin", {"base": tables_below(50)})
    with pytest.raises(UserError, match="same configuration and seed 0"):
        compare([seeds[0], twin])
    other = make(tmp_path / "other", {"base": tables_below(50)}, "seed=7", groups="u")
    with pytest.raises(UserError, match="answered different questions"):
        compare([seeds[0], other])
    with pytest.raises(UserError, match="is no run directory"):
        compare([tmp_path])
    empty = make(tmp_path / "empty", {"base": tables_below(50)})
    RunDir(empty).chain_file.write_text(dump(read(QUICKSTART, ["evaluation.entries=[dpo]"])))
    with pytest.raises(UserError, match="no entry of the ladder is complete"):
        compare([empty])
    assert len(compare([seeds[0], seeds[0]])["conditions"][0]["runs"]) == 1


def test_an_entry_that_left_the_chain_leaves_the_comparison(tmp_path):
    path = make(tmp_path / "run", {"base": tables_below(50), "multi_agent": tables_below(60)})
    RunDir(path).chain_file.write_text(dump(read(QUICKSTART, ["evaluation.entries=[base]"])))
    (condition,) = compare([path])["conditions"]
    assert condition["entries"] == ["base"]


def test_names_of_runs_stay_text(tmp_path):
    path = make(tmp_path / "a|b<i>", {"base": tables_below(50)})
    (path / "provenance.json").write_text(
        json.dumps({"starts": [{"command": ["/x/insightv", "run", "my chain.yaml"]}]})
    )
    text = write_comparison(compare([path]), None, None)
    assert "a\\|b\\<i\\>" in text
    assert "    insightv run 'my chain.yaml'" in text


def test_a_complete_run_shows_every_part(tmp_path):
    path = runs.make_run(tmp_path / "run", tables=4)
    RunDir(path).chain_file.write_text(dump(read(QUICKSTART)))
    text = write_comparison(compare([path]), None, None)
    for part in ("### Perception", "the judge's card", "the paper's figure 6", "81.2", "DocVQA"):
        assert part.lower() in text.lower()
