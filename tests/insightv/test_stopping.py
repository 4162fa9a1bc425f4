"""Early stop: rounds end by the validation split alone, and the best one's model is taken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hpc import gates
from hpc.errors import UserError
from hpc.rundir import Chain, RunDir, write_json
from hpc.shards import write_groups
from hpc.stages import Counts
from insightv.chain import assemble
from insightv.chainfile import read
from insightv.config import SETS
from insightv.evaluation import stopping
from insightv.evaluation.stopping import EarlyStopConfig, choose, decide, decisions, summary
from insightv.records import Question
from insightv.report import write_report

CONFIGS = Path(__file__).parents[2] / "configs" / "chain"
ON = ("rounds.early_stop.enabled=true", "rounds.count=3")


def make(tmp_path: Path, *overrides: str) -> Chain:
    return assemble(read(CONFIGS / "quickstart.yaml", overrides), RunDir(tmp_path / "run"))


def ask(run: Path, count: int = 40) -> None:
    """Validation questions, four a table."""
    rows = (
        Question(f"charts:validation:{i}", "How many?", (), str(i), "number", group=f"t{i // 4}")
        for i in range(count)
    )
    groups = ((row.key, [row.to_json()]) for row in rows)
    write_groups(run / "stages" / "questions-validation" / "shards", groups)


def answer(run: Path, number: int, right: int, count: int = 40, undecided: int = 0) -> None:
    """A round's answers: the first so many right, the last so many undecided."""
    groups = []
    for i in range(count):
        key = f"charts:validation:{i}"
        correct = None if i >= count - undecided else i < right
        groups.append((key, [{"question": key, "correct": correct}]))
    write_groups(run / "stages" / stopping.validation(number) / "shards", iter(groups))


def settle(run: Path, number: int, last: int = 3, **settings: Any) -> Counts:
    """Decides as the stage does, and leaves what its gate would."""
    counts = decide(run, number, last, EarlyStopConfig(True, **settings), 0)
    manifest = {"counts": counts, "seconds": 1.0}
    write_json(RunDir(run).manifest(stopping.decision(number)), manifest)
    return counts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    ask(path)
    answer(path, 0, 20)
    return path


def test_rounds_go_on_while_they_gain(run: Path) -> None:
    answer(run, 1, 24)
    counts = settle(run, 1)
    assert (counts["best"], counts["waited"], counts["skip"]) == (1, 0, "")
    assert counts["gain"] == pytest.approx(0.1) and counts["n"] == 40
    answer(run, 2, 25)
    assert settle(run, 2)["best"] == 2


@pytest.mark.parametrize("right", [24, 20])
def test_a_round_without_a_gain_ends_them(run: Path, right: int) -> None:
    """An equal one as well."""
    answer(run, 1, 24)
    settle(run, 1)
    answer(run, 2, right)
    counts = settle(run, 2)
    assert counts["best"] == 1
    assert counts["skip"].startswith("stopped after round 2, for it brought no gain: ")
    assert f"{100 * right / 40:.1f} % right of 40 validation questions" in counts["skip"]
    assert "against round 1, the best before" in counts["skip"]


def test_patience_waits_and_compares_with_the_best(run: Path) -> None:
    answer(run, 1, 30)
    settle(run, 1, last=5, patience=2)
    answer(run, 2, 10)
    assert settle(run, 2, last=5, patience=2)["skip"] == ""
    answer(run, 3, 20)  # better than round 2, not than round 1
    counts = settle(run, 3, last=5, patience=2)
    assert counts["against"] == 1 and counts["waited"] == 2
    assert "for the last 2 rounds brought no gain" in counts["skip"]


def test_a_gain_begins_the_waiting_anew(run: Path) -> None:
    for number, right in enumerate((18, 30, 29), 1):
        answer(run, number, right)
        counts = settle(run, number, last=5, patience=2)
    assert counts["waited"] == 1 and counts["best"] == 2 and counts["skip"] == ""


def test_small_gains_count_for_nothing_where_more_is_wanted(run: Path) -> None:
    answer(run, 1, 21)
    counts = settle(run, 1, min_gain=0.05)
    assert counts["best"] == 0
    assert "it brought no gain of more than 5 points" in counts["skip"]


def test_the_last_round_has_nothing_to_end(run: Path) -> None:
    answer(run, 1, 10)
    counts = settle(run, 1, last=1)
    assert counts["skip"] == "" and counts["best"] == 0


def test_only_questions_both_have_decided_are_compared(run: Path) -> None:
    answer(run, 1, 20, undecided=20)
    counts = settle(run, 1)
    assert counts["n"] == 20 and counts["accuracy"] == counts["accuracy_before"] == 1.0
    answer(run, 1, 20, undecided=40)
    counts = settle(run, 1)
    assert counts["n"] == 0 and counts["gain"] is None and counts["ci95"] is None
    assert "no validation question was decided" in counts["skip"]
    json.dumps(counts, allow_nan=False)


def test_the_best_model_is_taken_by_links(run: Path) -> None:
    for number, right in enumerate((30, 10), 1):
        answer(run, number, right)
        settle(run, number)
        (run / "models" / f"reasoning-r{number}" / "checkpoints").mkdir(parents=True)
        (run / "models" / f"reasoning-r{number}" / "model.safetensors").write_bytes(bytes([number]))
    for _ in range(2):  # again, too
        counts = choose(run, 3, "models/reasoning-chosen")
    assert counts["chosen"] == 1 and counts["from"] == "models/reasoning-r1"
    made = run / "models" / "reasoning-chosen" / "model.safetensors"
    assert made.samefile(run / "models" / "reasoning-r1" / "model.safetensors")
    assert not (made.parent / "checkpoints").exists()
    assert sorted(path.name for path in (run / "models").iterdir()) == [
        "reasoning-chosen",
        "reasoning-r1",
        "reasoning-r2",
    ]


def test_the_page_tells_when_and_why(run: Path) -> None:
    assert summary(run) is None
    for number, right in enumerate((30, 10), 1):
        answer(run, number, right)
        settle(run, number)
    assert summary(run) is None
    assert len(decisions(run)) == 2
    said = {"chosen": 1, "said": "round 1 is the best of 3 on the validation split"}
    write_json(RunDir(run).manifest("choose-round"), {"counts": said, "seconds": 1.0})
    found = summary(run)
    assert found is not None
    assert found["stopped_after"] == 2 and found["chosen"] == 1 and len(found["rounds"]) == 2
    page = re.sub(r"\s+", " ", write_report(run).read_text())
    assert "No round follows on round 2: stopped after round 2" in page
    assert "Round 1 is the best of 3 on the validation split; the entry iterative_dpo has" in page


def test_the_chain_waits_for_decisions_and_may_pass_over_rounds(tmp_path: Path) -> None:
    chain = make(tmp_path, *ON)
    stages = chain.stages
    for name in ("generate", "judge", "score", "pairs", "reference", "dpo", "validate", "decide"):
        assert stages[f"r3-{name}"].unless == ("r1-decide", "r2-decide"), name
        assert stages[f"r1-{name}"].unless == ()
    # Generation goes on beside the decision after the round before; all else waits for it.
    assert "r2-decide" not in stages["r3-generate"].parents
    assert "r2-decide" in stages["r3-judge"].parents
    assert set(stages["r2-decide"].parents) >= {"r0-validate", "r1-validate", "r2-validate"}
    assert "choose-round" in stages["eval-iterative-dpo"].parents
    assert "questions-test" not in stages["r1-validate"].parents
    assert not any(stage.unless for stage in make(tmp_path).stages.values())


def test_early_stop_leaves_the_rest_of_the_chain_as_it_is(tmp_path: Path) -> None:
    plain, stopping_early = make(tmp_path, "rounds.count=3"), make(tmp_path, *ON)
    other = {
        name
        for name in plain.stages
        if plain.identity(name) != stopping_early.identity(name)
        and name not in ("results", "eval-iterative-dpo")
    }
    assert other == {"r2-judge", "r3-judge"}  # they wait for one stage more


def test_what_cannot_be_decided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give questions\.charts\.validation"):
        make(tmp_path, *ON, *(f"questions.{n}.validation=0" for n in SETS))
    with pytest.raises(UserError, match=r"rounds\.early_stop\.patience is 0"):
        make(tmp_path, *ON, "rounds.early_stop.patience=0")
    with pytest.raises(UserError, match=r"rounds\.early_stop\.min_gain is 2"):
        make(tmp_path, *ON, "rounds.early_stop.min_gain=2")


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_real_chain_stops(tmp_path: Path) -> None:
    """No round can gain a hundred points: the second of two is left out."""
    import subprocess
    import sys

    words = (*ON[:1], "rounds.early_stop.min_gain=1", "evaluation.entries=[iterative_dpo]")
    words += ("questions.reading.test=0", "questions.shapes.test=0", "questions.charts.test=6")
    run = tmp_path / "run"
    command = [sys.executable, "-m", "insightv"]
    asked = [*command, "run", str(CONFIGS / "smoke.yaml"), *words, "--run-dir", str(run)]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = [*command, "status", str(run), "--json"]
    found = json.loads(subprocess.run(asked, capture_output=True, text=True).stdout)
    assert found["state"] == "complete"
    states = {stage["name"]: stage["state"] for stage in found["stages"]}
    skipped = {name for name, state in states.items() if state == "skipped"}
    assert skipped >= {f"r2-{name}" for name in ("judge", "score", "pairs", "dpo", "validate")}
    assert states["eval-iterative-dpo"] == states["report"] == "complete"
    results = json.loads((run / "results.json").read_text())
    assert results["early_stop"]["stopped_after"] == 1 and results["early_stop"]["chosen"] == 0
    assert not (run / "models" / "reasoning-r2").exists()
    assert gates.standing(assemble(read(run / "chain.yaml"), RunDir(run)))["report"]
