"""Benchmarks: lmms-eval's requests as questions, their sampling, stages, scores and tables."""

import io
import json
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from scripted import Scripted

from hpc import shards
from hpc.errors import UserError
from hpc.rundir import RunDir
from insightv.assessment.decision import RuleConfig
from insightv.assessment.judge import Judge, JudgeConfig
from insightv.chain import assemble
from insightv.chainfile import read
from insightv.evaluation import benchmarks, lmms_harness, paper
from insightv.evaluation.answering import EntryConfig
from insightv.evaluation.benchmark_scores import SCORES, score, summary
from insightv.evaluation.benchmarks import BenchmarksConfig, ByTask, ask, drawn_as, question_of
from insightv.pictures import decode
from insightv.prompting import load_prompts
from insightv.questions.texts import said_with_pictures
from insightv.records import Question
from insightv.rehearsal import small, units

QUICKSTART = Path(__file__).parents[2] / "configs" / "chain" / "quickstart.yaml"


def asked(text="What?", target=("7",), options=(), doc=0, task="chartqa", pictures=("a" * 64,)):
    content = [*({"picture": name} for name in pictures), {"text": text}]
    return {
        "task": task,
        "doc": doc,
        "split": "test",
        "content": content,
        "target": list(target),
        "options": list(options),
        "tokens": 16,
        "temperature": 0,
        "top_p": None,
    }


def test_pictures_within_the_text_are_named_where_there_are_several():
    assert said_with_pictures([None, "What is this?"]) == "What is this?"
    assert said_with_pictures(["Look:", None, "What?"]) == "Look:\nWhat?"
    assert said_with_pictures([None, "Is", None, "larger?"]) == "Is\n(picture 2)\nlarger?"
    assert said_with_pictures(["Or", None, "?"], before=1) == "Or\n(picture 2)\n?"


@pytest.mark.parametrize(
    ("row", "kind", "answer", "options"),
    [
        (asked(target=["12.5"]), "number", "12.5", ()),
        (asked(target=["Yes"]), "yes_no", "Yes", ()),
        (asked(target=["Norway"]), "label", "Norway", ()),
        (asked(target=["cat", "dog", "Dog"]), "label", "dog", ()),
        (asked(target=["B"], options=["up", "down"]), "choice", "B", ("up", "down")),
        (asked(target=["Down"], options=["up", "down"]), "choice", "B", ("up", "down")),
        (
            asked("Which?\nA. up\nB. down\nAnswer with a letter.", ["A"]),
            "choice",
            "A",
            ("up", "down"),
        ),
        (asked(target=["7"], options=["up", "down"]), "number", "7", ()),
        (asked(target=[]), "label", "", ()),
    ],
)
def test_requests_are_questions(row, kind, answer, options):
    question = question_of(row)
    assert (question.answer_type, question.answer, question.options) == (kind, answer, options)
    assert question.key == "chartqa:test:0" and question.pictures == ("a" * 64,)


def test_hostile_names_stay_parts_of_a_key():
    row = asked() | {"split": "validation[:10]/../x"}
    assert question_of(row).key == f"chartqa:validation{'_' * 2}10{'_' * 5}x:0"


def test_answers_are_drawn_as_the_task_says_and_reasoning_keeps_its_length():
    entry = EntryConfig("multi_agent", "multi_agent", "r", "s")
    drawn = drawn_as(entry, {"tokens": 16, "temperature": 0, "top_p": None})
    assert (drawn.answer.max_tokens, drawn.answer.temperature, drawn.answer.top_p) == (
        16,
        0.0,
        0.95,
    )
    assert (drawn.reasoning.max_tokens, drawn.reasoning.temperature) == (4096, 0.0)
    assert entry.answer.temperature == 0.2


def test_both_agents_get_every_picture_and_each_task_its_rules():
    import asyncio

    step = '{"title": "t", "content": "8", "next_action": "summary"}'
    reasoner, summariser = Scripted(lambda *_: step), Scripted(lambda *_: "10.3")
    config = BenchmarksConfig()
    tasks = ("chartqa_x", "mmmu_x")
    mapper = ByTask(
        EntryConfig("multi_agent", "multi_agent", "r", "s"),
        load_prompts("default"),
        {
            task: Judge(
                None, load_prompts("default"), JudgeConfig(config.judged(task, RuleConfig()))
            )
            for task in tasks
        },
        reasoner,
        summariser,
        0,
        dict.fromkeys(tasks, {"tokens": 16, "temperature": 0, "top_p": None}),
    )

    async def answer():
        found = []
        for task in tasks:
            question = question_of(asked(target=["10"], task=task, pictures=("a" * 64, "b" * 64)))
            found += await mapper(question.key, {"questions": [question.to_json()]})
        await mapper.close()
        return found

    relaxed, exact = asyncio.run(answer())
    assert relaxed["correct"] is True and exact["correct"] is False
    assert reasoner.closed and summariser.closed
    for engine in (reasoner, summariser):
        assert [request.pictures for request in engine.requests] == [("a" * 64, "b" * 64)] * 2
    assert step in summariser.requests[0].messages[0].text
    assert summariser.requests[0].sampling.max_tokens == 16


# ---- the stages


def test_the_chain_asks_answers_and_scores(tmp_path):
    plain = assemble(read(QUICKSTART), RunDir(tmp_path))
    keys = ["benchmarks.tasks=[chartqa,mmmu_val]", "benchmarks.python=/envs/lmms/bin/python"]
    config = read(QUICKSTART, keys)
    chain = assemble(config, RunDir(tmp_path))
    made = set(chain.stages) - set(plain.stages)
    answered = {"lmms-base", "lmms-multi-agent", "lmms-iterative-dpo"}
    assert made == {"questions-lmms", "lmms-scores", *answered}
    assert set(chain.stages["lmms-scores"].inputs.values()) == {"questions-lmms", *answered}
    assert chain.stages["lmms-multi-agent"].after == ("sft-reasoning", "sft-summary")
    assert "lmms-scores" in chain.stages["results"].after
    work = units(config, chain)
    assert work["lmms-base"] == 2000 and units(small(config, 0.01, 20), chain)["lmms-base"] == 40
    for key in ("benchmarks.limit=5", "benchmarks.rules.chartqa.integer_tolerance=0"):
        other = assemble(read(QUICKSTART, [*keys, key]), RunDir(tmp_path))
        changed = {name for name in made if other.identity(name) != chain.identity(name)}
        assert changed == ({"questions-lmms", "lmms-scores"} if "limit" in key else answered)


def test_paths_are_those_of_where_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").symlink_to(sys.executable)
    config = read(QUICKSTART, ["benchmarks.tasks=[a]", "benchmarks.python=python"])
    assert config.benchmarks.python == str(tmp_path / "python") and not config.benchmarks.folder


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("benchmarks.python=''", "name the interpreter"),
        ("benchmarks.entries=[judge_card]", "no entry 'judge_card'"),
        ("benchmarks.entries=[mutli_agent]", "did you mean multi_agent"),
        ("benchmarks.entries=[]", "name who answers"),
        ('benchmarks.tasks=["a b"]', "no name of a task"),
        ("benchmarks.limit=-1", "limit is 0 or more"),
    ],
)
def test_what_cannot_be_asked_is_told(tmp_path, key, wrong):
    keys = ["benchmarks.tasks=[chartqa]", "benchmarks.python=python3", key]
    with pytest.raises(UserError, match=wrong):
        assemble(read(QUICKSTART, keys), RunDir(tmp_path))


class Place:
    """A stage's context."""

    def __init__(self, run, stage, inputs):
        self.run, self.directory, self._inputs = run, run / "stages" / stage, inputs
        self.stop = False

    def shards(self, role):
        return self.run / "stages" / self._inputs[role] / "shards"

    def progress(self, done, total, **numbers):
        pass

    def stopping(self):
        return self.stop


HARNESS = """
import json, sys
from pathlib import Path
command, work = sys.argv[-2], Path(sys.argv[-1])
wanted = json.loads((work / "tasks.json").read_text())
if wanted["tasks"] == ["none"]:
    sys.exit("lmms-eval has no task 'none'")
if command == "ask":
    (work / "pictures").mkdir()
    (work / "pictures" / PICTURE).write_bytes(bytes.fromhex(DATA))
    (work / "asked.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in ROWS))
    (work / "made.json").write_text('{"version": "0.7.3"}')
else:
    rows = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()]
    parts = {str(row["doc"]): float(row["text"] == "7") for row in rows}
    value = sum(parts.values()) / len(parts)
    found = {"value": value, "n": len(parts), "scale": 1, "ci95": None, "documents": parts}
    (work / "scores.json").write_text(json.dumps({"chartqa": {"relaxed_overall": found}}))
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """Stands in for lmms-eval's process: files in, files out."""
    import hashlib

    packed = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(packed, "PNG")
    name = hashlib.sha256(packed.getvalue()).hexdigest()
    rows = [asked(f"{n}?", doc=n, pictures=(name,)) for n in range(5)]
    text = f"PICTURE, DATA, ROWS = {name!r}, {packed.getvalue().hex()!r}, {rows!r}\n{HARNESS}"
    script = tmp_path / "harness.py"
    script.write_text(text)
    monkeypatch.setattr(benchmarks, "_HARNESS", script)


def predictions(run, entry, answers):
    """What an entry answered; one question failed where an answer is None."""
    groups = []
    for doc, text in enumerate(answers):
        key = f"chartqa:test:{doc}"
        row = {
            "key": f"{key}@{entry}",
            "question": key,
            "entry": entry,
            "reasoning": "r",
            "reasoning_answer": "7",
            "reasoning_correct": True,
            "answer": text,
            "correct": None if text == "?" else text in ("7", "7.0"),
            "rule": "number",
            "tokens": 1,
            "models": [],
        }
        groups.append((key, [] if text is None else [row]))
    shards.write_groups(run / "stages" / f"lmms-{entry}" / "shards", groups)


def test_questions_answers_and_scores_travel(tmp_path, harness):
    config = BenchmarksConfig(["chartqa"], python=sys.executable)
    assert ask(config, Place(tmp_path, "questions-lmms", {})) == {"chartqa": 5}
    rows = list(shards.read_rows(tmp_path / "stages/questions-lmms/shards"))
    assert [Question.from_json(row).text for row in rows] == [f"{n}?" for n in range(5)]
    predictions(tmp_path, "base", ["7", "8", "7.0", "?", None])
    predictions(tmp_path, "multi_agent", ["7", "7", "7", "7", "7"])
    inputs = {"questions": "questions-lmms", "base": "lmms-base", "multi_agent": "lmms-multi_agent"}
    place = Place(tmp_path, SCORES, inputs)
    counts = score(config, ["base", "multi_agent"], place, seed=0)
    assert counts == {"scores": 2, "differ": 1}
    assert not list(tmp_path.glob("stages/*/work*"))
    found = json.loads((place.directory / "scores.json").read_text())
    base, both = found["scores"]
    assert (base["value"], base["n"], base["failed"], both["value"]) == (0.25, 4, 1, 1.0)
    assert base["ci95"] == [0.25, 0.25]  # one picture: nothing to resample
    own = found["own"][0]
    assert (own["accuracy"], own["undecided"], own["differ"]) == (2 / 3, 1, 1)
    assert own["examples"] == ["chartqa:test:2"]  # "7.0" to us is 7
    assert found["confusion"]["chartqa"]["base"]["reasoning_right_answer_undecided"] == 1
    assert found["differences"][0]["difference"] == 0.75
    records = {row["key"]: row for row in shards.read_rows(place.directory / "shards")}
    assert records["chartqa:test:2@base"]["differs"] is True
    failed = records["chartqa:test:4@base"]
    assert failed["answer"] is None and failed["rule"] == "failed" and not failed["differs"]
    told = paper.markdown(found)
    assert "| – paper, LLaVA-NeXT | 36.9 | 13.2 |" in told and "| base | – | – |" in told
    assert "multi_agent − base | +75.0 [+75.0, +75.0]" in told


def test_lmms_eval_that_fails_is_quoted(tmp_path, harness):
    place = Place(tmp_path, "questions-lmms", {})
    with pytest.raises(
        UserError, match=r"failed: lmms-eval has no task 'none'; see .*lmms-eval.log"
    ):
        ask(BenchmarksConfig(["none"], python=sys.executable), place)
    with pytest.raises(UserError, match="cannot be run"):
        ask(BenchmarksConfig(["chartqa"], python=str(tmp_path / "nowhere")), place)
    for key in ("folder", "include"):
        wrong = BenchmarksConfig(["chartqa"], python=sys.executable, **{key: "/nowhere"})
        with pytest.raises(UserError, match=f"benchmarks.{key}: /nowhere is no folder"):
            ask(wrong, place)


def test_a_stage_that_is_asked_to_leave_ends_lmms_eval(tmp_path, monkeypatch):
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(benchmarks, "_HARNESS", sleeper)
    place = Place(tmp_path, "questions-lmms", {})
    log = place.directory / "logs" / "lmms-eval.log"

    def stopping():
        return log.exists() and len(log.read_text().splitlines()) > 1

    place.stopping = stopping
    assert ask(BenchmarksConfig(["chartqa"], python=sys.executable), place) is None
    lines = log.read_text().splitlines()
    assert shlex.split(lines[0])[1:3] == [sys.executable, "-I"]
    assert not Path(f"/proc/{lines[1]}").exists()


# ---- tables


def scored(task, metric, entry, value):
    return {
        "task": task,
        "metric": metric,
        "entry": entry,
        "value": value,
        "ci95": [value - 0.01, value + 0.01],
        "n": 100,
        "failed": 0,
    }


def test_the_papers_numbers_are_the_papers():
    """Tables 3 and 4 average table 3's benchmarks; what stands in two tables is the same."""
    names = (*paper._ABLATED, "average")
    for row in paper._TABLE_3.values():
        *parts, average = row[paper.OWN]
        assert sum(parts) / len(parts) == pytest.approx(average, abs=0.051)
    first = {
        entry: dict(zip(paper._MAIN, row[paper.OWN], strict=True))
        for entry, row in paper._TABLE_1.items()
    }
    third = {
        entry: dict(zip(names, row[paper.OWN], strict=True))
        for entry, row in paper._TABLE_3.items()
    }
    for entry in ("base", "multi_agent"):
        assert all(first[entry][name] == third[entry][name] for name in paper._ABLATED)
    assert paper._TABLE_4["multi_agent"][paper.OWN][0] == third["multi_agent"]["average"]
    last = [first["iterative_dpo"][name] for name in paper._ABLATED]
    assert sum(last) / 4 == pytest.approx(paper._TABLE_4["iterative_dpo"][paper.OWN][0], abs=0.051)


def test_averages_need_all_of_their_benchmarks():
    four = [
        scored("mmmu_val", "mmmu_acc", "base", 0.4),
        scored("chartqa", "relaxed_overall", "base", 0.6),
        scored("mmstar", "average", "base", 0.5),
        scored("mathvista_testmini_format", "llm_as_judge_eval", "base", 30.0),
    ]
    empty = {"own": [], "differences": [], "confusion": {}}
    whole = paper.markdown({"scores": four, **empty})
    assert "| base | 40.0 [39.0, 41.0] | 60.0 [59.0, 61.0] | 30.0 [30.0, 30.0] | 50.0" in whole
    assert "| 45.0 |" in whole
    part = paper.markdown({"scores": four[:3], **empty})
    assert "| 45.0 |" not in part and "Table 4" not in part
    pro = [
        scored(f"mmmu_pro_{name}", "mmmu_acc", "base", v)
        for name, v in (("standard", 0.2), ("vision", 0.3))
    ]
    assert "| base | – | 25.0 | –" in paper.markdown({"scores": pro, **empty})


def test_a_table_without_truths_has_no_own_accuracy():
    question = question_of(asked(target=[]))
    told = {question.key: {"correct": False, "reasoning": "", "reasoning_answer": ""}}
    found = summary({question.key: question}, {"base": (told, {})}, 0)
    assert found["own"][0]["accuracy"] is None and found["confusion"] == {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "CMYK"])
def test_a_benchmarks_picture_is_stored_as_it_is_shown(tmp_path, mode):
    """Transparency reaches whoever decodes it, by which it is put on white."""
    picture = Image.new("LA" if mode == "LA" else "RGBA", (20, 20)).convert(mode)
    name = lmms_harness._stored(picture, tmp_path)
    shown = decode((tmp_path / name).read_bytes(), name)
    assert shown.getpixel((5, 5)) == ((255,) * 3 if "A" in mode else (0,) * 3)
