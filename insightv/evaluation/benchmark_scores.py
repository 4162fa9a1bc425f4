"""What lmms-eval's benchmarks come to: scores, intervals, and this package's verdicts beside.

Shards hold a record for each question and entry, with both verdicts; ``scores.json`` beside
them the table of all scores, this package's own accuracy, paired differences and confusion
matrices.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc import shards
from hpc.rundir import RunDir, read_json, write_json
from hpc.stages import Context, Counts, Row
from insightv.evaluation.benchmarks import BenchmarksConfig, fresh, made_with, run_harness
from insightv.evaluation.statistics import accuracy, paired_difference, verdict_name
from insightv.records import Question

SCORES = "lmms-scores"
ALONE = "evaluations/lmms"
"""Where ``insightv benchmark`` works, within a run."""
_FOUND = "scores.json"


def score(
    config: BenchmarksConfig, entries: Sequence[str], context: Context, seed: int
) -> Counts | None:
    """Lets lmms-eval score the answers; records, and a table of all scores, are written.

    Args:
        config: The chain's.
        entries: Who answered; each is an input of the stage, with its predictions.
        context: The stage's.
        seed: Of the resamples.

    Returns:
        Counts; None if the stage was asked to leave.

    Raises:
        UserError: lmms-eval cannot be run, or a metric of its fails.
    """
    questions = {
        row["key"]: Question.from_json(row) for row in shards.read_rows(context.shards("questions"))
    }
    found: dict[str, Any] = {}
    for place, entry in enumerate(entries):
        context.progress(place, len(entries))
        work = fresh(context)
        told = {row["question"]: row for row in shards.read_rows(context.shards(entry))}
        with (work / "answers.jsonl").open("w", encoding="utf-8") as file:
            for key, row in told.items():
                line = {"task": _task(key), "doc": int(_doc(key)), "text": row["answer"]}
                file.write(json.dumps(line | {"group": questions[key].group}) + "\n")
        if not run_harness(config, "score", work, context):
            return None
        found[entry] = (told, json.loads((work / "scores.json").read_text(encoding="utf-8")))
        shutil.rmtree(work)
    records = _records(questions, found)
    shards.write_groups(context.directory / "shards", records, config.per_shard)
    table = summary(questions, found, seed)
    table["version"] = made_with(context.shards("questions")).get("version", "")
    write_json(context.directory / _FOUND, table)
    return {"scores": len(table["scores"]), "differ": sum(row["differ"] for row in table["own"])}


def _records(
    questions: Mapping[str, Question], found: Mapping[str, Any]
) -> Iterator[tuple[str, list[Row]]]:
    """Each question's answers with both verdicts."""
    for key, question in questions.items():
        rows: list[Row] = []
        task, doc = _task(key), _doc(key)
        for entry, (told, scores) in found.items():
            metrics = {
                metric: row["documents"][doc]
                for metric, row in scores.get(task, {}).items()
                if row["documents"].get(doc) is not None
            }
            row = told.get(key)
            own = row and row["correct"] if question.answer else None
            rows.append(
                {
                    "key": f"{key}@{entry}",
                    "question": key,
                    "entry": entry,
                    "target": question.answer,
                    "answer": row["answer"] if row else None,
                    "lmms": metrics,
                    "correct": own,
                    "rule": row["rule"] if row else "failed",
                    "differs": _differs(own, scores.get(task, {}), doc),
                }
            )
        yield key, rows


def _differs(own: bool | None, scores: Mapping[str, Any], doc: str) -> bool:
    """Whether a verdict is not that of the task's first metric that has the question."""
    told = (row["documents"].get(doc) for row in scores.values())
    lmms = next((float(value) for value in told if value is not None), None)
    return own is not None and lmms is not None and own != (lmms >= 0.5)


def summary(questions: Mapping[str, Question], found: Mapping[str, Any], seed: int) -> Row:
    """All scores with intervals; own accuracy beside; differences; confusion matrices.

    Args:
        questions: By key.
        found: By entry: its predictions by question, and lmms-eval's scores by task and metric.
        seed: Of the resamples.
    """
    tasks = sorted({_task(key) for key in questions})
    keys = {task: [key for key in questions if _task(key) == task] for task in tasks}
    made: dict[str, Any] = {"scores": [], "own": [], "differences": [], "confusion": {}}
    for task in tasks:
        for entry, (told, scores) in found.items():
            for metric, row in scores.get(task, {}).items():
                made["scores"].append(
                    {
                        "task": task,
                        "entry": entry,
                        "metric": metric,
                        "value": row["value"],
                        "ci95": row["ci95"] or _of_mean(row, questions, keys[task], seed),
                        "n": row["n"],
                        "failed": len(keys[task]) - sum(key in told for key in keys[task]),
                    }
                )
            made["own"].append(_own(task, entry, told, scores, questions, keys[task], seed))
            if counts := _confusion(told, keys[task]):
                made["confusion"].setdefault(task, {})[entry] = counts
        made["differences"] += _differences(task, found, questions, keys[task], seed)
    return made


def _of_mean(
    row: Mapping[str, Any], questions: Mapping[str, Question], keys: list[str], seed: int
) -> list[float] | None:
    """The interval of a metric that is a mean over documents, by groups of one picture."""
    if row["scale"] is None:
        return None
    values, groups = _values(row, questions, keys)
    estimate = accuracy(values, groups, seed)
    return [row["scale"] * estimate.low, row["scale"] * estimate.high]


def _values(
    row: Mapping[str, Any], questions: Mapping[str, Question], keys: Iterable[str]
) -> tuple[list[float], list[str]]:
    """What each document counts, and its group."""
    having = [key for key in keys if row["documents"].get(_doc(key)) is not None]
    values = [float(row["documents"][_doc(key)]) for key in having]
    return values, [questions[key].group for key in having]


def _own(
    task: str,
    entry: str,
    told: Mapping[str, Row],
    scores: Mapping[str, Any],
    questions: Mapping[str, Question],
    keys: Sequence[str],
    seed: int,
) -> Row:
    """This package's own accuracy, and where its verdicts are not lmms-eval's."""
    judged = [key for key in keys if key in told and questions[key].answer]
    decided = [key for key in judged if told[key]["correct"] is not None]
    estimate = accuracy(
        [bool(told[key]["correct"]) for key in decided],
        [questions[key].group for key in decided],
        seed,
    )
    differ = [
        key for key in decided if _differs(told[key]["correct"], scores.get(task, {}), _doc(key))
    ]
    return {
        "task": task,
        "entry": entry,
        "accuracy": estimate.value if estimate.n else None,
        "ci95": [estimate.low, estimate.high] if estimate.n else None,
        "n": estimate.n,
        "undecided": len(judged) - len(decided),
        "differ": len(differ),
        "examples": differ[:20],
    }


def _confusion(told: Mapping[str, Row], keys: Iterable[str]) -> dict[str, int]:
    """Reasoning × answer by this package's own verdicts, as in `results.confusion`."""
    counts: Counter[str] = Counter()
    for row in (told[key] for key in keys if key in told):
        if row["reasoning"] and row["reasoning_answer"]:
            reasoning = verdict_name(row["reasoning_correct"])
            counts[f"reasoning_{reasoning}_answer_{verdict_name(row['correct'])}"] += 1
    return dict(sorted(counts.items()))


def _differences(
    task: str,
    found: Mapping[str, Any],
    questions: Mapping[str, Question],
    keys: Sequence[str],
    seed: int,
) -> Iterator[Row]:
    """Each entry minus the first, in lmms-eval's first metric, paired by question."""
    first, *others = found
    for entry in others:
        ours, theirs = found[entry][1].get(task, {}), found[first][1].get(task, {})
        metric = next((name for name in ours if name in theirs and ours[name]["scale"]), None)
        if metric is None:
            continue
        a, b, scale = ours[metric]["documents"], theirs[metric]["documents"], ours[metric]["scale"]
        both = [key for key in keys if None not in (a.get(_doc(key)), b.get(_doc(key)))]
        estimate = paired_difference(
            [float(a[_doc(key)]) for key in both],
            [float(b[_doc(key)]) for key in both],
            [questions[key].group for key in both],
            seed,
        )
        yield {
            "task": task,
            "entry": entry,
            "other": first,
            "metric": metric,
            "difference": scale * estimate.value if estimate.n else None,
            "ci95": [scale * estimate.low, scale * estimate.high] if estimate.n else None,
            "n": estimate.n,
        }


def _task(key: str) -> str:
    return key.partition(":")[0]


def _doc(key: str) -> str:
    return key.rpartition(":")[2]


def read_scores(run: Path) -> Row | None:
    """The table of a run's scores, made by its chain or by ``insightv benchmark``; None without."""
    for found in (RunDir(run), RunDir(run / ALONE)):
        if found.read_manifest(SCORES):
            return dict(read_json(found.stage_dir(SCORES) / _FOUND) or {}) or None
    return None
