"""A small run directory as a chain leaves it: real shards, real pictures, hostile texts."""

import io
import json
import math
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from PIL import Image, ImageDraw

from hpc import shards
from hpc.config import dump
from hpc.driver import Quiet, drive
from hpc.executors.local import LocalExecutor
from hpc.rundir import Chain, RunDir
from insightv.assessment.scoring import RETEST
from insightv.chain import assemble
from insightv.config import ChainConfig
from insightv.evaluation.results import LADDER, eval_stage
from insightv.pictures import PictureWriter
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
from insightv.steps import render_steps

HOSTILE = "</script><img src=x onerror=alert(1)>"
HOSTILE_KEY = "charts:train:<svg onload=alert(2)>"
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun")
CHANCE = dict(zip(LADDER, (0.30, 0.38, 0.52, 0.54, 0.36, 0.62, 0.66, 0.69), strict=True))


def begun(run: Path, told: ChainConfig, stages: Sequence[str]) -> threading.Thread:
    """Some of a chain's first stages, on their way in a run folder that is made here."""
    whole = assemble(told, RunDir(run))
    part = Chain([whole.stages[name] for name in stages], whole.run, whole.command, whole.packages)
    run.mkdir()
    (run / "chain.yaml").write_text(dump(told))
    driving = threading.Thread(target=drive, args=(part, LocalExecutor(), Quiet(), 2))
    driving.start()
    return driving


def chart(table: dict[str, int]) -> bytes:
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    for number, (label, value) in enumerate(table.items()):
        x = 4 + number * 92 // len(table)
        draw.rectangle([x, 82 - 3 * value, x + 11, 82], fill="#27548a")
        draw.text((x - 2, 84), label, fill="black", font_size=8)
        draw.text((x, 72 - 3 * value), str(value), fill="black", font_size=8)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_questions(split: str, tables: int, writer: PictureWriter, seed: int) -> list[Question]:
    """Three questions a table, and for the test split shapes and readings too."""
    rng = random.Random(seed)
    made = []
    for number in range(tables):
        labels = rng.sample(MONTHS, 4)
        table = {label: rng.randint(1, 20) for label in labels}
        picture = writer.add(chart(table))
        a, b = labels[:2]
        asked = [
            ("charts", "difference", f"How much more is {a} than {b}?", table[a] - table[b]),
            ("charts", "sum", f"What is the sum of {a} and {b}?", table[a] + table[b]),
            ("charts", "max", "What is the highest value?", max(table.values())),
        ]
        if split == "test":
            asked.append(("reading", "value", f"What is the value of {a}?", table[a]))
            asked.append(("shapes", "count", "How many bars are there?", 4))
        for place, (benchmark, task, text, answer) in enumerate(asked):
            made.append(
                Question(
                    key=f"{benchmark}:{split}:{3 * number + place}",
                    text=text,
                    pictures=(picture,),
                    answer=str(answer),
                    answer_type="number",
                    task=task,
                    group=f"table-{number}",
                )
            )
    return made


def make_steps(rng: random.Random, question: Question, answer: str) -> tuple[Step, ...]:
    read = ", ".join(f"{month} {rng.randint(1, 20)}" for month in MONTHS[: rng.randint(2, 4)])
    steps = [Step("Find the bars", f"The question asks: {question.task}.", "continue")]
    steps.append(Step("Read their values", read, "continue"))
    steps += [Step("Check", "The labels agree.", "continue")] * rng.randint(0, 2)
    steps.append(Step("Compute", f"That gives {answer}.", "summary"))
    return tuple(steps)


def commit(run: Path, stage: str, groups: list, counts: dict | None = None) -> None:
    """Writes a stage's shards and its manifest."""
    folder = run / "stages" / stage
    shards.write_groups(folder / "shards", groups, per_shard=64)
    (folder / "manifest.json").write_text(json.dumps({"counts": counts or {}}))


def group(records) -> list:
    """Groups of rows by question key, in order."""
    groups: dict = {}
    for record in records:
        key = getattr(record, "question", None) or record.key
        groups.setdefault(key, []).append(record.to_json())
    return list(groups.items())


def make_round(run: Path, number: int, questions: list[Question], paths: int, skill: float):
    """Generation, verdicts and scores (some given twice) of a round; returns the records."""
    rng = random.Random(100 + number)
    made, verdicts, scores, again = [], [], [], []
    for question in questions:
        for k in range(paths):
            key = f"{question.key}/r{number}/p{k}"
            right = rng.random() < skill
            answer = question.answer if right else str(int(question.answer) + rng.randint(1, 5))
            steps = make_steps(rng, question, answer)
            correct: bool | None = right
            if k == 1 and question.key in (questions[0].key, questions[5].key):
                answer, correct = HOSTILE, None
                steps = (Step(HOSTILE, f"“{HOSTILE}” \u202etxet", "summary"),)
            cut = rng.random() < 0.05
            path = ReasoningPath(
                key,
                question.key,
                steps,
                "" if cut else answer,
                "truncated" if cut else "summary",
                20 + 14 * len(steps) + rng.randint(0, 12),
                1 + cut,
                "0123abcd",
                "tiny-1",
                k,
            )
            made.append(path)
            correct = None if cut else correct
            rule = "undecided" if correct is None else "number"
            verdicts.append(
                Verdict(key, question.key, correct, rule, "no number found" if cut else "")
            )
            marks = [min(100, max(1, round(rng.gauss(74 if right else 48, 14)))) for _ in range(3)]
            total = round(sum(marks) / 3)
            bad = (2,) if total < 60 else ()
            if rng.random() < 0.04:
                scores.append(
                    PathScore(key, question.key, None, None, None, None, reason="not JSON")
                )
            else:
                scores.append(PathScore(key, question.key, *marks, total, bad_steps=bad))
                near = min(100, max(1, total + round(rng.gauss(0, 5))))
                again.append(PathScore(key, question.key, *marks, near, reason=RETEST))
    failed = FailedPath(
        f"{questions[1].key}/r{number}/p{paths}", questions[1].key, f"no JSON object {HOSTILE}"
    )
    records = {"generate": [*made, failed], "judge": verdicts, "score": [*scores, *again]}
    keys = [question.key for question in questions]
    for stage, rows in records.items():
        by_key = dict(group(rows))
        commit(run, f"r{number}-{stage}", [(key, by_key.get(key, [])) for key in keys])
    return made, {v.path: v for v in verdicts}, {s.path: s for s in scores}


def make_pairs(run: Path, number: int, paths, verdicts, scores) -> None:
    by_question: dict = {}
    for path in paths:
        by_question.setdefault(path.question, []).append(path)
    groups = []
    for key, found in by_question.items():
        winners = [p for p in found if verdicts[p.key].correct]
        losers = [p for p in found if verdicts[p.key].correct is False]
        rows = [
            PreferencePair(
                f"{w.key}|{x.key}",
                key,
                (),
                (Message("user", "Steps."),),
                render_steps(w.steps),
                render_steps(x.steps),
                "right>wrong",
            ).to_json()
            for w, x in zip(winners, losers, strict=False)
        ]
        if rows:
            groups.append((key, rows))
    commit(run, f"r{number}-pairs", groups)


def make_sets(run: Path, paths, verdicts) -> None:
    right = [p for p in paths if verdicts[p.key].correct]
    wrong = [p for p in paths if verdicts[p.key].correct is False]

    def sample(name: str, n: int, path: ReasoningPath, kind: str) -> TrainingSample:
        turns = (Message("user", "Steps."), Message("assistant", "…", True))
        return TrainingSample(f"{name}:{n}", path.question, (), turns, kind, (path.key,))

    reasoning = [sample("reasoning", n, p, "reasoning:best") for n, p in enumerate(right[:60])]
    summary = [sample("summary", n, p, "summary:good") for n, p in enumerate(right[:40])]
    summary += [sample("summary", 40 + n, p, "summary:wrong") for n, p in enumerate(wrong[:20])]
    commit(run, "set-reasoning", group(reasoning))
    commit(run, "set-summary", group(summary))


def make_metrics(run: Path, stage: str, steps: int, preference: bool) -> None:
    rng = random.Random(stage)
    folder = run / "stages" / stage
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 0.4 + 2 * math.exp(-step / 30) + rng.gauss(0, 0.05)}
        if preference:
            drift = step / steps
            row |= {
                "loss": 0.69 - 0.25 * drift + rng.gauss(0, 0.02),
                "reward_chosen": 0.4 * drift + rng.gauss(0, 0.04),
                "reward_rejected": -0.7 * drift + rng.gauss(0, 0.04),
                "margin": 1.1 * drift + rng.gauss(0, 0.05),
                "accuracy": 0.5 + 0.35 * drift,
                "logp_chosen": -21 + 2 * drift,
                "logp_rejected": -25 - 4 * drift,
                "both_falling": False,
            }
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "lo')
    (folder / "manifest.json").write_text("{}")


def make_predictions(run: Path, questions: list[Question]) -> None:
    """Every entry of the ladder, and the judge's card."""
    hard = {
        question.group: random.Random(question.group).uniform(-0.2, 0.2) for question in questions
    }
    for entry, chance in CHANCE.items():
        rng = random.Random(entry)
        rows = []
        for question in questions:
            bonus = 0.28 if question.benchmark != "charts" else hard[question.group]
            right = rng.random() < chance + bonus
            answer = question.answer if right else str(int(question.answer) + 1)
            reasons = entry not in ("base", "summary_only")
            sound = right if rng.random() < 0.85 else not right
            steps = make_steps(rng, question, answer)
            if entry == "multi_agent":
                steps = (*steps[:-1], Step(HOSTILE, f"That gives {answer}.", "summary"))
            rows.append(
                Prediction(
                    f"{question.key}@{entry}",
                    question.key,
                    entry,
                    render_steps(steps) if reasons else "",
                    steps[-1].content if reasons else "",
                    answer,
                    None if rng.random() < 0.01 else right,
                    sound if reasons else None,
                    "number",
                    rng.randint(40, 70) if reasons else 3,
                    ("0123abcd",),
                )
            )
        commit(run, eval_stage(entry), group(rows))
    rng = random.Random("card")
    rows = []
    for question in questions:
        for mode, chance in (("agent", 0.62), ("none", 0.36), ("other", 0.31)):
            entry = f"judge_card:{mode}"
            right = rng.random() < chance
            rows.append(
                Prediction(
                    f"{question.key}@{entry}",
                    question.key,
                    entry,
                    "",
                    "",
                    "1",
                    right,
                    None,
                    "number",
                    3,
                    ("0123abcd",),
                )
            )
    commit(run, "eval-judge-card", group(rows))


@mock.patch("os.fsync", lambda descriptor: None)  # a test's run need not survive a power failure
def make_run(run: Path, tables: int = 14, paths: int = 4, rounds: int = 2) -> Path:
    """A complete run of ``rounds`` rounds over ``3 * tables`` training questions."""
    run.mkdir(parents=True)
    with PictureWriter(run / "stages" / "questions-train" / "pictures") as writer:
        train = make_questions("train", tables, writer, 1)
    first = train[0]
    train[0] = Question(
        HOSTILE_KEY,
        f"How much? {HOSTILE}",
        first.pictures,
        first.answer,
        "number",
        task=HOSTILE,
        group=first.group,
    )
    train[3] = Question(
        train[3].key, train[3].text, ("0" * 64,), train[3].answer, "number", task="sum", group="t"
    )
    with PictureWriter(run / "stages" / "questions-test" / "pictures") as writer:
        test = make_questions("test", 3 * tables, writer, 2)
    commit(run, "questions-train", group(train))
    commit(run, "questions-test", group(test))
    for number in range(rounds):
        found = make_round(run, number, train, paths, 0.45 + 0.12 * number)
        if number == 0:
            make_sets(run, found[0], found[1])
            for stage in ("sft-reasoning", "sft-summary"):
                make_metrics(run, stage, 120, preference=False)
        else:
            make_pairs(run, number, *found)
            make_metrics(run, f"r{number}-dpo", 60, preference=True)
    make_predictions(run, test)
    (run / "provenance.json").write_text(
        json.dumps({"starts": [{"time": "2026-01-05T12:00:00+0000", "python": "3.12.1"}]})
    )
    return run
