"""`why`: from any key back to the picture and forward to the models."""

from pathlib import Path

import pytest
from rich.console import Console

from hpc.errors import UserError
from hpc.rundir import RunDir
from hpc.shards import ShardWriter, write_groups
from insightv import lineage
from insightv.chain import assemble
from insightv.chainfile import read
from insightv.records import (
    FailedPath,
    Message,
    PathScore,
    Prediction,
    PreferencePair,
    Question,
    ReasoningPath,
    Step,
    TrainingSample,
    Verdict,
)

QUICKSTART = Path(__file__).parents[2] / "configs" / "chain" / "quickstart.yaml"
COUNT = 5
EVIL = "[red]\x1b[2J\u202egnp.exe"


def key(n: int) -> str:
    return f"charts:train:{n}"


def path_record(n: int, number: int, k: int) -> ReasoningPath:
    steps = (
        Step("Read", f"bar {n} is {k}", "continue"),
        Step(EVIL if n == 3 else "Answer", f"it is {k}", "summary"),
    )
    name = f"{key(n)}/r{number}/p{k}"
    return ReasoningPath(name, key(n), steps, str(k), "summary", 40, 1, "m0del", "tiny-1", 1000 + k)


def put(run: RunDir, stage: str, groups: list, complete: bool = True) -> None:
    groups = [(name, [row.to_json() for row in rows]) for name, rows in groups]
    write_groups(run.shards(stage), groups, per_shard=2)
    if complete:
        run.manifest(stage).write_text("{}")


@pytest.fixture
def told(tmp_path):
    """A run of five questions; returns a function from key to the printed lineage."""
    run = RunDir(tmp_path / "run")
    chain = assemble(read(QUICKSTART), run)
    turns = (Message("user", "Steps."), Message("assistant", "the steps", True))
    questions = [
        Question(key(n), f"How much is {n}?", (f"{n}" * 64,), "1", "number", (), "read", f"t{n}")
        for n in range(COUNT)
    ]
    put(run, "questions-train", [(q.key, [q]) for q in questions])
    for number in (0, 1):
        prefix = f"r{number}"
        paths = {key(n): [path_record(n, number, k) for k in (0, 1)] for n in range(COUNT)}
        paths[key(4)].append(FailedPath(f"{key(4)}/{prefix}/p2", key(4), "step 1: no JSON", "hm"))
        put(run, f"{prefix}-generate", list(paths.items()))
        put(
            run,
            f"{prefix}-judge",
            [
                (name, [Verdict(p.key, name, p.answer == "1", "number") for p in found[:2]])
                for name, found in paths.items()
            ],
        )
        put(
            run,
            f"{prefix}-score",
            [
                (name, [PathScore(found[1].key, name, 70, 80, 90, 81, (2,))])
                for name, found in paths.items()
            ],
        )
    sample = TrainingSample(
        f"{key(2)}/r0/p1/reasoning", key(2), (), turns, "reasoning:best", (f"{key(2)}/r0/p1",)
    )
    put(run, "set-reasoning", [(sample.key, [sample])])
    run.stage_dir("sft-reasoning").mkdir()
    run.manifest("sft-reasoning").write_text("{}")
    pair_key = f"{key(2)}/r1/p1|{key(2)}/r1/p0"
    pair = PreferencePair(pair_key, key(2), (), turns[:1], "win", "lose", "right>wrong", 12)
    put(run, "r1-pairs", [(key(2), [pair])])
    scored = PreferencePair.from_json(
        pair.to_json()
        | {"reference_chosen": -3.5, "reference_rejected": -4.25, "reference_model": "r3f"}
    )
    put(run, "r1-reference", [(key(2), [scored])])
    asked = Question("charts:test:0", "And now?", ("f" * 64,), "7", "number")
    put(run, "questions-test", [(asked.key, [asked])])
    prediction = Prediction(
        "charts:test:0@multi_agent",
        asked.key,
        "multi_agent",
        "the reasoning",
        "it is 8",
        "7",
        True,
        False,
        "number",
        50,
        ("aaa", "bbb"),
    )
    put(run, "eval-multi-agent", [(asked.key, [prediction])])

    def print_lineage(name: str) -> str:
        console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
        console.print(lineage.why(run, chain.stages, name))
        return console.export_text()

    print_lineage.run = run
    return print_lineage


def test_question_of_every_kind_of_key():
    for name in (
        "a:b:1",
        "a:b:1/r0/p3",
        "a:b:1/r0/p3|a:b:1/r0/p4",
        "a:b:1@multi_agent",
        "a:b:1@judge_card:none",
        "a:b:1/r0/p3/reasoning",
        "summary:a:b:1/r0/p3/summary",
        "a:b:1/plain",
    ):
        assert lineage.question_of(name) == "a:b:1"


def test_a_path_back_to_its_picture_and_forward_to_models(told):
    text = told("charts:train:2/r0/p1")
    for part in (
        "How much is 2?",
        "true answer 1",
        "2222222222222222",
        "questions-train/pictures",
        "model m0del",
        "seed 1001",
        "bar 2 is 1",
        "r0-judge: right by number",
        "total 81, logic 70",
        "set-reasoning reasoning:best",
        "models/reasoning by sft-reasoning, used by",
        "r1-generate",
    ):
        assert part in text, part
    assert "flagged" in text.split("Answer")[1].splitlines()[0]
    assert "charts:train:2/r0/p0" not in text


def test_a_pair_holds_both_its_paths(told):
    text = told("charts:train:2/r1/p1|charts:train:2/r1/p0")
    assert "gap 12" in text
    assert text.index("chosen charts:train:2/r1/p1") < text.index("rejected charts:train:2/r1/p0")
    assert "chosen -3.50, rejected -4.25 nats, model r3f" in text
    assert "models/reasoning-r1 (not made yet) by r1-dpo" in text


def test_a_path_knows_its_pairs_once(told):
    text = told("charts:train:2/r1/p0")
    assert text.count("rejected (right>wrong)") == 1


def test_a_sample(told):
    text = told("charts:train:2/r0/p1/reasoning")
    assert "from charts:train:2/r0/p1" in text and "the steps" in text and "(learned)" in text


def test_a_prediction(told):
    text = told("charts:test:0@multi_agent")
    for part in ("And now?", "right by number", "arrives at 'it is 8', wrong", "aaa, bbb"):
        assert part in text, part
    assert "models/reasoning (sft-reasoning)" in text and "models/summary (sft-summary)" in text


def test_a_question_lists_its_paths_failed_ones_too(told):
    text = told("charts:train:4")
    assert text.count("charts:train:4/r") == 5 + 1
    assert "step 1: no JSON" in text
    assert "right 81/100" in text
    assert "step 1: no JSON" in told("charts:train:4/r1/p2")


def test_a_failed_question_says_where(told):
    run = told.run
    write_groups(run.shards("set-direct"), [("x", [])])
    folder = run.shards("r2-generate")
    for index in range(3):
        writer = ShardWriter(folder, index)
        for n in range(2 * index, min(2 * index + 2, COUNT)):
            writer.add(key(n), [], error="all paths failed")
        writer.commit()
    assert "failed in r2-generate: all paths failed" in told(key(3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("charts:train:99", "no question 'charts:train:99'"),
        ("charts:train:2/r7/p1", "no record 'charts:train:2/r7/p1'"),
        ("nonsense", "no question 'nonsense'"),
    ],
)
def test_unknown_keys(name, message, told):
    with pytest.raises(UserError) as error:
        told(name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_hostile_text_is_shown_and_not_obeyed(told):
    text = told("charts:train:3/r0/p1")
    assert "[red]\ufffd[2J\ufffdgnp.exe" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_only_the_shard_of_the_question_is_opened(told, monkeypatch):
    opened = []
    real = lineage.read_entries
    monkeypatch.setattr(lineage, "read_entries", lambda path: (opened.append(path), real(path))[1])
    told("charts:train:4/r0/p0")
    mapped = [path.name for path in opened if path.parent.parent.name.startswith("r0-")]
    assert mapped == ["00002.jsonl.zst"] * 3
