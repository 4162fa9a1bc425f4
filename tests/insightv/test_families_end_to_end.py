"""The whole chain on the families of real bases: every stage has rows.

A tiny folder of each family is overfitted on made-up paths about the chain's own training
questions until most of what it writes parses; some of those paths are wrong, so that verdicts
differ and pairs can be formed. It knows nothing else: no accuracy is looked at.
"""

import random
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from families import save_family
from test_end_to_end import SMOKE, insightv

from hpc import gates
from hpc.shards import read_rows
from insightv import models
from insightv.agents import direct_messages, final_messages
from insightv.assessment.marks import Marks
from insightv.assessment.scoring import render_paths, render_scores
from insightv.chain import build
from insightv.chainfile import read
from insightv.demo.sets import make_questions
from insightv.pictures import Pictures, PictureWriter
from insightv.prompting import Prompts, load_prompts
from insightv.records import Message, Question, Step, TrainingSample
from insightv.steps import render_steps
from insightv.training.config import SFTConfig
from insightv.training.trainer import train_sft

pytestmark = pytest.mark.timeout(1800)

FAMILIES = ("llava-next", "llava-onevision", "qwen2.5-vl", "qwen3-vl")
SMALL = (
    "questions.charts={train: 10, validation: 2, test: 4}",
    "questions.reading={train: 3, validation: 2, test: 2}",
    "questions.shapes={train: 3, validation: 2, test: 2}",
    "questions.per_shard=8",
)
"""Fewer questions than the smoke chain has: less to learn by heart, less to answer."""
SHORT = ("evaluation.entries=[base,iterative_dpo]", "rounds.count=1")
"""Each kind of stage once; the ladder's other entries are more of the same kinds."""
WORDS = (
    '"title": "Look", "content": "See ',
    '"title": "Answer", "content": "answer ',
    '{"path": ',
    ', "logic": ',
    ', "grounding": ',
    ', "completeness": ',
    ', "total": ',
    ', "bad_steps": []}',
    " Steps.",
    " Answer.",
    " Score.",
)
"""One token each, as in a vocabulary that was learned from such texts: short sequences."""
WRONG = "7"
MARKS = (20, 50, 80)


class Alone:
    """What a training asks of its job, without one."""

    def __init__(self, folder: Path):
        self.run = folder
        self.directory = folder / "training"
        self.directory.mkdir()

    def progress(self, done, total, **numbers):
        if done % 20 == 0:
            print(done, total, numbers, flush=True)

    def stopping(self):
        return False


def path_for(question: Question, rng: random.Random) -> tuple[tuple[Step, ...], str]:
    """A path of two or three steps to the right answer, or (two times in five) to a wrong one."""
    answer = question.answer if rng.random() < 0.6 else WRONG
    seen = rng.sample(range(1, 10), rng.randint(1, 2))  # a step said twice is no good path
    looks = [Step("Look", f"See {number}.", "continue") for number in seen]
    return (*looks, Step("Answer", f"answer {answer}", "summary")), answer


def lessons(prompts: Prompts, question: Question, rng: random.Random) -> list[TrainingSample]:
    """Paths with their final turn, a direct answer, and scores of several paths."""

    def sample(name: str, messages: tuple[Message, ...]) -> TrainingSample:
        return TrainingSample(
            f"{question.key}/{name}", question.key, question.pictures, messages, "lesson"
        )

    made = []
    for number in range(3):
        steps, answer = path_for(question, rng)
        text = render_steps(steps)
        *asked, _, final = final_messages(prompts, question, text)
        turns = (Message("assistant", text, True), final, Message("assistant", answer, True))
        made.append(sample(f"path{number}", (*asked, *turns)))
    told = Message("assistant", question.answer, True)
    made.append(sample("direct", (*direct_messages(prompts, question), told)))
    paths = [render_steps(path_for(question, rng)[0]) for _ in range(rng.randint(1, 4))]
    marks = [Marks(*(rng.choice(MARKS) for _ in range(4)), ()) for _ in paths]
    prompt = prompts.render(
        "score", question=question.text, paths=render_paths(paths), count=len(paths)
    )
    scored = Message("assistant", render_scores(marks), True)
    made.append(sample("scores", (Message("user", prompt), scored)))
    return made


def overfit(family: str, folder: Path, steps: int) -> Path:
    """A folder of the family that writes paths, answers and scores in the chain's forms."""
    config, prompts, rng = read(SMOKE, SMALL), load_prompts("tiny"), random.Random(0)
    with PictureWriter(folder / "pictures") as writer:
        questions = list(make_questions("train", config.questions, config.seed, writer))
    rows = [row.to_json() for q in questions for row in lessons(prompts, q, rng)]
    settings = SFTConfig(
        max_steps=steps,
        epochs=1000,
        batch_size=16,
        learning_rate=3e-3,
        warmup=0.1,
        freeze_vision=False,
        precision="fp32",
        max_length=4096,
    )
    base = save_family(family, folder / "untaught", hidden=96, tile=28, words=WORDS)
    pictures = Pictures([folder / "pictures"])
    train_sft(settings, base, rows, pictures, folder / "taught", Alone(folder))
    return folder / "taught"


_folders = TemporaryDirectory(prefix="families-")


@lru_cache
def taught(family: str) -> Path:
    """The overfitted folder, made once for all tests here."""
    folder = Path(_folders.name) / family
    folder.mkdir()
    return overfit(family, folder, steps=90)


@pytest.fixture(scope="module", autouse=True)
def swept():
    """Removes the folders behind the last test."""
    yield
    _folders.cleanup()


def run_chain(family: str, run: Path, *words: str) -> None:
    """Runs the chain with the overfitted model in every role; each stage must have rows."""
    told = (*SMALL, f"models.base.path={taught(family)}", "models.base.prompts=tiny", *words)
    insightv("run", SMOKE, *told, "--run-dir", run)
    chain = build(run)
    assert all(gates.standing(chain).values())
    for name, stage in chain.stages.items():
        if not stage.outputs:
            assert chain.run.read_manifest(name)["rows"] > 0, name
    asked = chain.run.read_manifest("questions-train")["inputs"] * read(SMOKE).generation.paths
    for stage in (name for name in chain.stages if name.endswith("-generate")):
        parsed = [row for row in read_rows(chain.run.shards(stage)) if "steps" in row]
        assert len(parsed) > asked / 2, stage
        assert any(len(row["steps"]) > 1 and row["finish"] == "summary" for row in parsed)
    assert {row["correct"] for row in read_rows(chain.run.shards("r0-judge"))} >= {True, False}
    scores = list(read_rows(chain.run.shards("r0-score")))
    assert sum(row["total"] is not None for row in scores) > len(scores) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_has_rows(family, tmp_path):
    run = tmp_path / "run"
    run_chain(family, run, *SHORT)
    trained = [models.load(run / "models" / name) for name in ("reasoning", "reasoning-r1")]
    assert len({one.digest for one in trained} | {models.digest_of(taught(family))}) == 3
    pairs = list(read_rows(run / "stages" / "r1-reference" / "shards"))
    assert pairs
    for pair in pairs:
        assert pair["reference_model"] == trained[0].digest
        assert pair["reference_chosen"] < 0 and pair["reference_rejected"] < 0


@pytest.mark.full
@pytest.mark.parametrize("family", [*FAMILIES, "qwen2-vl"])
def test_every_entry_of_the_ladder(family, tmp_path):
    run = tmp_path / "run"
    run_chain(family, run)
    for name in ("reasoning", "summary", "reasoning-r2"):
        assert list((run / "models" / name).glob("*.safetensors"))
