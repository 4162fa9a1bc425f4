import itertools
import json
import shutil

import pytest
import runs
from rich.console import Console

from hpc import shards
from insightv.evaluation.results import (
    LADDER,
    collect,
    eval_stage,
    read_metrics,
    results_table,
    write_results,
)
from insightv.records import FailedPath, Prediction, Question, ReasoningPath, Step, Verdict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.make_run(tmp_path_factory.mktemp("results") / "quickstart")


@pytest.fixture(scope="module")
def results(run):
    return write_results(run)


def rows(run, stage):
    return list(shards.read_rows(run / "stages" / stage / "shards"))


def test_results_file_is_what_was_collected_and_plain_json(run, results):
    text = (run / "results.json").read_text()
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert loaded == json.loads(json.dumps(results))
    assert results["run"] == "quickstart"
    assert results["benchmarks"] == ["charts", "reading", "shapes"]


def test_ladder_counts_every_prediction_once(run, results):
    assert [row["name"] for row in results["ladder"] if row["benchmark"] == "charts"] == list(
        LADDER
    )
    for rung in results["ladder"]:
        found = [
            row["correct"]
            for row in rows(run, eval_stage(rung["name"]))
            if row["question"].startswith(rung["benchmark"] + ":")
        ]
        decided = [value for value in found if value is not None]
        assert rung["n"] == len(decided)
        assert rung["undecided"] == len(found) - len(decided)
        assert rung["accuracy"] == pytest.approx(sum(decided) / len(decided))
        low, high = rung["ci95"]
        assert low <= rung["accuracy"] <= high
        assert rung["groups"] <= 42


def test_every_pair_of_entries_has_its_difference(results):
    charts = [row for row in results["differences"] if row["benchmark"] == "charts"]
    names = {row["name"] for row in charts}
    assert names == {f"{b} - {a}" for a, b in itertools.combinations(LADDER, 2)}
    gain = next(row for row in charts if row["name"] == "multi_agent - base")
    assert gain["difference"] > 0 and gain["ci95"][0] > 0
    assert gain["paper"] == {"average": 0.029, "chartqa": 0.055}
    dpo = next(row for row in charts if row["name"] == "iterative_dpo - dpo")
    assert dpo["paper"] == {"average": 0.006}


def test_confusion_adds_up_to_the_charts_that_were_reasoned_about(run, results):
    assert set(results["confusion"]) == set(LADDER) - {"base", "summary_only"}
    counts = results["confusion"]["multi_agent"]
    assert sum(counts.values()) == sum(
        row["question"].startswith("charts:") for row in rows(run, "eval-multi-agent")
    )
    assert counts["reasoning_right_answer_right"] > counts["reasoning_wrong_answer_right"]


def test_judge_card_counts_harm_and_rescue_by_hand(run, results):
    card = results["judge_card"]
    by_mode = {}
    for row in rows(run, "eval-judge-card"):
        if row["question"].startswith("charts:"):
            by_mode.setdefault(row["entry"].split(":")[1], {})[row["question"]] = row["correct"]
    before, after = by_mode["none"], by_mode["other"]
    harmed = sum(before[key] and not after[key] for key in before)
    assert card["harm"]["other"] == {
        "changed": harmed,
        "of": sum(before.values()),
        "share": pytest.approx(harmed / sum(before.values())),
    }
    rescued = sum(by_mode["agent"][key] and not before[key] for key in before)
    assert card["rescue"]["agent"]["changed"] == rescued
    assert card["none"] == pytest.approx(sum(before.values()) / len(before))
    assert card["n"] == len(before)
    assert "judge_card:none" not in {row["name"] for row in results["ladder"]}


def test_funnel_agrees_with_the_shards(run, results):
    first, second = results["funnel"]["rounds"]
    verdicts = [row["correct"] for row in rows(run, "r0-judge")]
    assert first["paths"] == 168 == sum(first["verdicts"].values())
    assert first["verdicts"]["right"] == verdicts.count(True)
    assert first["verdicts"]["undecided"] == verdicts.count(None) > 0
    once = [row for row in rows(run, "r0-score") if row["reason"] != "retest"]
    assert first["scored"] + sum(first["unscored"].values()) == len(once) == 168
    assert first["failed_paths"] == 1 and first["questions"] == 42
    assert first["unscored"].keys() == {"not JSON"}
    assert first["kept"] == {"reasoning": 60, "summary": 60}
    assert first["pairs"] is None and second["pairs"] == len(rows(run, "r1-pairs"))
    assert results["funnel"]["questions"] == 42
    assert results["funnel"]["sets"]["summary"]["kinds"] == {
        "summary:good": 40,
        "summary:wrong": 20,
    }
    for part in first["distributions"].values():
        for name in ("right", "wrong", "undecided"):
            assert sum(part[name]["counts"]) == part[name]["n"]
    assert first["score_auc"] > 0.8


def test_agreement_of_two_scorings(results):
    found = results["score_agreement"]["r0"]
    assert found["spearman"] > 0.8
    assert 1 < found["difference"] < 8
    assert len(found["points"]) == found["n"]


def test_training_refers_to_its_curves(run, results):
    found = results["training"]["sft-reasoning"]
    assert found["steps"] == 120
    assert found["last"]["loss"] < found["first"]["loss"]
    assert read_metrics(run / found["file"])[0]["step"] == 1


def test_metrics_pass_over_what_is_no_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "ok": true}\n[1]\n{"step": 2, "loss": 0.5}\n{"st')
    assert read_metrics(path) == [{"step": 1.0}, {"step": 2.0, "loss": 0.5}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_table_shows_all_entries_and_what_was_left_out(results):
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(results_table(results))
    text = capture.get()
    rung = next(
        row
        for row in results["ladder"]
        if row["name"] == "multi_agent" and row["benchmark"] == "charts"
    )
    low, high = (100 * edge for edge in rung["ci95"])
    assert f"{100 * rung['accuracy']:.1f} [{low:.1f}, {high:.1f}]" in text
    assert all(entry in text for entry in LADDER)
    assert "81.2" in text and "undecided" in text


def test_what_became_no_question_is_told(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    manifest = copy / "stages/questions-train/manifest.json"
    told = json.loads(manifest.read_text())
    told["counts"] = {"chartqa": 3, "dropped: chartqa: picture: none": 2}
    manifest.write_text(json.dumps(told))
    assert collect(copy)["funnel"]["left_out"] == {"chartqa: picture: none": 2}


def test_an_empty_run_gives_an_empty_ladder(tmp_path):
    (tmp_path / "stages").mkdir()
    results = collect(tmp_path)
    assert results["ladder"] == [] and results["judge_card"] is None
    assert results["funnel"] == {
        "questions": None,
        "left_out": {},
        "rounds": [],
        "sets": {},
        "control_pairs": None,
    }
    with Console(width=80).capture():
        Console().print(results_table(results))


def test_stages_that_are_not_committed_do_not_count(run, tmp_path):
    copy = tmp_path / "half"
    shutil.copytree(run, copy)
    for stage in ("eval-multi-agent", "r1-judge", "set-summary"):
        (copy / "stages" / stage / "manifest.json").unlink()
    results = collect(copy)
    assert "multi_agent" not in {row["name"] for row in results["ladder"]}
    assert results["funnel"]["rounds"][1]["verdicts"] is None
    assert results["funnel"]["rounds"][1]["paths"] == 168
    assert "summary" not in results["funnel"]["sets"]


def test_failed_questions_and_paths_are_told_with_their_reasons(tmp_path):
    run = tmp_path / "run"
    question = Question("charts:test:0", "?", (), "1", "number")
    path = ReasoningPath(
        "charts:test:0/r0/p0",
        question.key,
        (Step("a", "b", "summary"),),
        "1",
        "summary",
        9,
        1,
        "m",
        "p",
        0,
    )
    failed = FailedPath("charts:test:0/r0/p1", question.key, "no JSON object").to_json()
    verdict = Verdict(path.key, question.key, True, "number")
    runs.commit(run, "questions-test", [(question.key, [question.to_json()])])
    runs.commit(run, "r0-generate", [(question.key, [path.to_json(), failed])])
    runs.commit(run, "r0-judge", [(question.key, [verdict.to_json()])])
    writer = shards.ShardWriter(run / "stages" / "eval-base" / "shards", 0)
    writer.add(
        question.key,
        [
            Prediction(
                "charts:test:0@base", question.key, "base", "", "", "1", True, None, "number", 1, ()
            ).to_json()
        ],
    )
    writer.add("charts:test:1", [], "picture is broken")
    writer.commit()
    (run / "stages" / "eval-base" / "manifest.json").write_text("{}")
    results = collect(run)
    assert results["ladder"][0]["failed"] == 1
    assert results["ladder"][0]["ci95"][1] == 1.0
    row = results["funnel"]["rounds"][0]
    assert (row["paths"], row["failed_paths"]) == (1, 1)
    assert row["path_failures"] == {"no JSON object": 1}
