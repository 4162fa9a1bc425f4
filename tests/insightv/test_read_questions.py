"""Sets that are read, in a chain: their stage, what it leaves out, what is hard."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from set_files import chartqa, lines, picture

from hpc import gates
from hpc.errors import UserError
from hpc.rundir import RunDir
from hpc.shards import read_rows
from hpc.work import work
from insightv import cli
from insightv.chain import assemble, build
from insightv.chainfile import checked, folders, read
from insightv.config import ChainConfig
from insightv.payloads.thinking import Only, questions
from insightv.pictures import Pictures
from insightv.records import Question
from insightv.rehearsal import small

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "chain" / "smoke.yaml"
NONE = "{train: 0, validation: 0, test: 0}"


@dataclass
class Told:
    """A stage's context that keeps what it is told."""

    run: Path
    directory: Path
    seen: list = field(default_factory=list)

    def shards(self, role):
        raise AssertionError(role)

    def progress(self, done, total, **numbers):
        self.seen.append((done, total))

    def stopping(self):
        return False


@pytest.fixture
def folder(tmp_path):
    """ChartQA's schema; the test split repeats some of the training split's questions."""
    train = [(picture(n), f"How many bars are there in {n}?", [str(n)], 0) for n in range(40)]
    held = [(picture(n), f"How many bars are there in {n}?", [str(n)], 1) for n in range(3)]
    held += [(picture(n), "Is it red?", ["No"], 1) for n in range(3, 8)]
    held += [(picture(100 + n), f"What is {n}?", ["Norway"], 1) for n in range(6)]
    chartqa(tmp_path / "sets", "train", train)
    chartqa(tmp_path / "sets", "val", [(picture(200), "How many?", ["4"], 0), train[20]])
    chartqa(tmp_path / "sets", "test", held)
    return tmp_path / "sets"


def config(folder, *more: str) -> ChainConfig:
    sizes = [f"questions.{name}={NONE}" for name in ("charts", "reading", "shapes")]
    return read(
        SMOKE,
        [
            *sizes,
            f"questions.sets=[{ROOT}/configs/data/chartqa.yaml]",
            f"questions.folder={folder}",
            "questions.reasoned=[chartqa]",
            "questions.plain=[chartqa]",
            *more,
        ],
    )


def make(settings: ChainConfig, split: str, folder: Path):
    directory = folder / f"stages/questions-{split}"
    directory.mkdir(parents=True, exist_ok=True)
    counts = questions(settings, split)(Told(folder, directory))
    rows = [Question.from_json(row) for row in read_rows(directory / "shards")]
    dropped = [json.loads(line) for line in (directory / "dropped.jsonl").open()]
    return rows, counts, dropped, Pictures([directory / "pictures"])


def test_training_never_sees_what_evaluation_asks(folder, tmp_path):
    rows, counts, dropped, pictures = make(config(folder), "train", tmp_path / "run")
    assert counts["chartqa"] == len(rows) == 36
    assert counts["dropped: chartqa: duplicate: evaluation asks it too"] == 4
    assert counts["held out: questions looked for"] == 16
    assert counts["kept, though evaluation shows the picture"] == 5
    assert {row["key"] for row in dropped} == {f"chartqa:train:{n}" for n in (0, 1, 2, 20)}
    assert {row["detail"] for row in dropped} == {
        *(f"as chartqa:test:{n}" for n in range(3)),
        "as chartqa:validation:1",
    }
    assert not any(row["broken"] for row in dropped)
    assert all(pictures.image(row.pictures[0]) for row in rows) and len(list(pictures)) == 36

    rows, counts, _, _ = make(config(folder, "questions.duplicates=picture"), "train", tmp_path)
    assert len(rows) == 31
    assert counts["dropped: chartqa: duplicate: evaluation shows its picture"] == 5
    rows, counts, _, _ = make(config(folder, "questions.duplicates=keep"), "train", tmp_path)
    assert len(rows) == 40 and set(counts) == {"chartqa"}


def test_a_further_set_is_held_out_and_asked_nowhere(folder, tmp_path):
    (folder / "bench").mkdir()
    (folder / "bench/a.png").write_bytes(picture(30, form="PNG", optimize=True))
    row = {"question": "how many bars are there in 30", "answer": "1", "image": "a.png"}
    lines(folder / "bench/rows.jsonl", [row])
    mapping = "name: bench\npath: bench\nformat: jsonl\nsplits: {test: {files: [rows.jsonl]}}\n"
    (tmp_path / "bench.yaml").write_text(mapping)
    settings = config(folder, f"questions.held_out=[{tmp_path}/bench.yaml]")
    rows, _, dropped, _ = make(settings, "train", tmp_path / "run")
    assert "chartqa:train:30" not in {row.key for row in rows}
    assert "as bench:test:0" in {row["detail"] for row in dropped}
    rows, _, _, _ = make(settings, "test", tmp_path / "run")
    assert {row.benchmark for row in rows} == {"chartqa"}


def test_sizes_are_kept_and_draws_do_not_depend_on_the_split_asked_before(folder, tmp_path):
    take = "questions.take={chartqa: {train: 10, test: 5}}"
    settings = config(folder, take)
    train, *_ = make(settings, "train", tmp_path / "a")
    test, *_ = make(settings, "test", tmp_path / "a")
    assert (len(train), len(test)) == (10, 5)
    assert settings.questions.asked("train")["chartqa"] == 10
    assert config(folder).questions.asked("test")["chartqa"] == 14
    assert set(folders(settings)) >= {folder / "ChartQA"}
    with pytest.raises(UserError, match="the validation split has none"):
        make(settings, "validation", tmp_path / "a")
    seeded = config(folder, take, "seed=5")
    assert [q.key for q in make(seeded, "test", tmp_path / "b")[0]] == [q.key for q in test]
    assert [q.key for q in make(seeded, "train", tmp_path / "b")[0]] != [q.key for q in train]


def test_a_rehearsal_takes_its_share_of_sets_that_are_read(folder, tmp_path):
    made = small(config(folder, "questions.take={chartqa: {train: 30, test: 14}}"), 0.1, 2)
    assert vars(made.questions.take["chartqa"]) == {"train": 3, "validation": 0, "test": 2}
    made = small(config(folder), 0.1, 2)  # no sizes: rows are counted
    assert vars(made.questions.take["chartqa"]) == {"train": 4, "validation": 2, "test": 2}
    rows, *_ = make(made, "train", tmp_path / "run")
    assert len(rows) == 4


def test_only_files_that_are_read_must_be_there(folder):
    for path in folder.glob("ChartQA/data/test-*"):
        path.unlink()
    only = "questions.take={chartqa: {train: 5}}"
    with pytest.raises(UserError, match=r"test-\*.parquet"):
        config(folder, only)  # looked through for duplicates
    assert config(folder, only, "questions.duplicates=keep")


def test_sizes_of_the_hub_must_be_given(folder):
    with pytest.raises(UserError, match="give the sizes of chartqa"):
        config("/nowhere", "questions.network=true")


def test_a_set_that_is_mostly_broken_stops_the_run_with_its_reasons(folder, tmp_path):
    rows = [(picture(n) if n else b"broken", f"{n}?", ["1"], 0) for n in range(4)]
    chartqa(folder, "train", rows)
    settings = config(folder, "error_limit=0.2")
    with pytest.raises(UserError, match=r"1 of 4 questions of train are broken \(picture … cannot"):
        make(settings, "train", tmp_path / "run")
    rows, counts, dropped, _ = make(config(folder, "error_limit=0.25"), "train", tmp_path / "run")
    assert len(rows) == 3 and dropped[0]["broken"]
    assert (
        "dropped: chartqa: picture … cannot be decoded: none of PNG, JPEG, WEBP, GIF, BMP" in counts
    )


def test_a_run_stands_on_its_own_and_knows_its_data(folder, tmp_path):
    settings = config(folder)
    assert settings.questions.sets == [] and settings.questions.mappings[0].name == "chartqa"

    def identities(*more):
        chain = assemble(config(folder, *more), RunDir(tmp_path / "x"))
        return {name: chain.identity(name) for name in chain.stages}

    before = identities()
    assert identities() == before
    fewer = identities("questions.take={chartqa: {train: 5, test: 14}}")
    assert fewer["questions-train"] != before["questions-train"]
    # Another training file: other training questions, the same test.
    chartqa(folder, "train", [(picture(n), f"{n}?", ["1"], 0) for n in range(50)])
    after = identities()
    assert after["questions-train"] != before["questions-train"]
    assert after["questions-test"] == before["questions-test"]
    # Another test file: training, from which it is held out, is made again too.
    chartqa(folder, "test", [(picture(n), f"{n}?", ["1"], 0) for n in range(60, 70)])
    last = identities()
    assert last["questions-test"] != after["questions-test"]
    assert last["questions-train"] != after["questions-train"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("questions.sets=[nowhere.yaml]", "nowhere.yaml"),
        ("questions.reasoned=[docvqa]", "no set 'docvqa'; use charts, reading, shapes, chartqa"),
        ("questions.take={docvqa: {train: 1}}", "questions.take: no set 'docvqa'; use chartqa"),
        ("questions.take={chartqa: {train: -1}}", "give 0 or more"),
        ("questions.hard=[nothing]", "questions.hard: no set 'nothing'"),
        ("questions.duplicates=some", "use question, picture, keep"),
        ("questions.folder=/nowhere", "hf download --repo-type dataset HuggingFaceM4/ChartQA"),
    ],
)
def test_mistakes_are_told_before_any_work(folder, override, told):
    with pytest.raises(UserError) as error:
        config(folder, override)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_two_sets_of_one_name_are_refused(folder):
    path = ROOT / "configs/data/chartqa.yaml"
    with pytest.raises(UserError, match="two sets are named chartqa"):
        checked(SMOKE, [f"questions.sets=[{path}, {path}]"])


def test_the_worked_chain_of_own_data_is_sound():
    settings = checked(ROOT / "configs/chain/own-data.yaml")
    assert [m.name for m in settings.questions.mappings] == ["chartqa", "cauldron-ai2d"]
    assert [m.name for m in settings.questions.held_out_mappings] == ["ai2d"]


class Echo:
    concurrency = 1

    async def __call__(self, key, inputs):
        return [{"key": key}]

    async def close(self):
        return None


def test_only_questions_answered_wrong_are_hard():
    chosen = Only(Echo(), ["a", "b"], ["a"])

    def passed(key, *correct):
        rows = {"direct": [{"correct": value} for value in correct]}
        return bool(asyncio.run(chosen(key, rows)))

    assert passed("a:train:0", False)
    assert not passed("a:train:0", True) and not passed("a:train:0", None)
    assert not passed("a:train:0")  # its answer failed
    assert passed("b:train:0") and not passed("c:train:0", False)


@pytest.mark.timeout(600)
def test_the_generator_is_asked_directly_and_reasons_about_what_it_got_wrong(folder, tmp_path):
    """Real stages with the embedded model, up to the first paths."""
    settings = config(
        folder, "questions.hard=[chartqa]", "questions.take={chartqa: {train: 12, test: 2}}"
    )
    run = RunDir(tmp_path / "run")
    from insightv.cli.runs import save

    run.create()
    chain = assemble(settings, run)
    save(chain, settings, False)
    chain = build(run)
    assert chain.stages["r1-generate"].inputs["direct"] == "hard-direct"
    for name in ("questions-train", "hard-direct", "r0-generate"):
        gates.prepare(chain, name)
        assert work(chain, name) in (0, 78)
        assert gates.check(chain, name) == 0
    told = {row["question"]: row["correct"] for row in read_rows(run.shards("hard-direct"))}
    reasoned = {row["question"] for row in read_rows(run.shards("r0-generate"))}
    assert len(told) == 12
    assert reasoned == {key for key, correct in told.items() if correct is False}


def test_prefetch_tells_of_sets_that_are_read(folder, monkeypatch, capsys):
    words = [f"questions.sets=[{ROOT}/configs/data/chartqa.yaml]", f"questions.folder={folder}"]
    monkeypatch.setattr("sys.argv", ["insightv", "prefetch", str(SMOKE), *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert f"set    chartqa: 56 rows in {folder}/ChartQA" in capsys.readouterr().out
