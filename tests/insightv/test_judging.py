"""The labelled answers, and what the documentation says of them."""

import importlib.metadata
import json
import runpy
import sys
from pathlib import Path

import pytest

from insightv.assessment import numeric
from insightv.assessment.rules import decide
from insightv.records import Question

ROOT = Path(__file__).parents[2]
SETS = {
    name: [
        json.loads(line)
        for line in (ROOT / f"benchmarks/judging/{name}.jsonl").read_text("utf-8").splitlines()
    ]
    for name in ("first", "fresh", "later")
}
PAIRS = [pair for pairs in SETS.values() for pair in pairs]


def decided(pair):
    question = Question(
        "judging:all:0",
        pair["question"],
        (),
        pair["truth"],
        pair["type"],
        tuple(pair.get("options", ())),
        pair.get("task", ""),
    )
    return decide(question, pair["given"])


def test_the_pairs_are_many_balanced_and_different():
    assert len(PAIRS) >= 300
    assert 0.4 < sum(pair["right"] for pair in PAIRS) / len(PAIRS) < 0.6
    assert len({(pair["question"], pair["given"]) for pair in PAIRS}) == len(PAIRS)


def test_rules_that_decide_are_hardly_ever_wrong():
    """With math-verify or without: what it would decide is then left open."""
    outcomes = {name: [(pair, decided(pair)) for pair in pairs] for name, pairs in SETS.items()}
    wrong = {
        name: [
            (pair, decision)
            for pair, decision in found
            if decision.correct is not None and decision.correct != pair["right"]
        ]
        for name, found in outcomes.items()
    }
    assert len(wrong["first"]) + len(wrong["fresh"]) <= 6, wrong
    assert len(wrong["later"]) <= 8, wrong["later"]
    left = sum(d.correct is None for found in outcomes.values() for _, d in found)
    assert left < 0.36 * len(PAIRS)


def test_the_documented_tables_are_what_the_command_prints(tmp_path, monkeypatch, capsys):
    pytest.importorskip("math_verify")
    stored = json.loads((ROOT / "benchmarks/results/judging.json").read_text("utf-8"))
    if importlib.metadata.version("math-verify") != stored["math-verify"]:
        pytest.skip("another version of math-verify")
    monkeypatch.setattr(numeric, "LATEX_SECONDS", 60)  # however busy the machine is
    monkeypatch.setattr(sys, "argv", ["judging.py", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks/judging.py"), run_name="__main__")
    assert json.loads((tmp_path / "judging.json").read_text("utf-8")) == stored
    told = (tmp_path / "judging.md").read_text("utf-8").splitlines()
    assert set(told) <= set(capsys.readouterr().out.splitlines())
    documented = (ROOT / "docs/judge.md").read_text("utf-8").split("## Measured", 1)[1]
    rows = [line for line in documented.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert not [row for row in rows if row not in told]
