r"""Renders a run as one self-contained page.

Everything is inline: style, script, drawings, pictures. The page's own policy (a CSP with
the hashes of its style and script) forbids the network and any script but its own, so text
of models and data could do nothing even if it were not escaped; and it is: by jinja in the
HTML, as ``\\u003c`` in the data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hpc import shards
from hpc.accounting import by_stage, spent
from hpc.disk import make_folder, write_atomic
from hpc.errors import UserError
from hpc.rundir import RunDir, read_json
from hpc.status import used
from insightv.evaluation.benchmark_scores import read_scores
from insightv.evaluation.funnel import complete, rank_of_round, shard_folder, stage_names
from insightv.evaluation.paper import tables as paper_tables
from insightv.evaluation.results import (
    QUESTIONS,
    Results,
    collect,
    eval_stage,
    made_from,
    read_metrics,
)
from insightv.records import Prediction, Question
from insightv.report import drawings
from insightv.report.gallery import data_uri, gallery, questions, rank, store
from insightv.steps import parse_steps

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: Path) -> Path:
    """Writes ``report/index.html`` from what the run has so far; missing stages are named.

    Args:
        run: The run directory.

    Returns:
        The page's path.

    Raises:
        UserError: There is no run, or one of its shards is damaged.
    """
    run = Path(run)
    if not (run / "stages").is_dir():
        raise UserError(f"{run} is no run directory (it has no stages/); give the run's folder")
    page = render(run, current_results(run))
    target = RunDir(run).report / "index.html"
    # A lone surrogate in a model's text has no UTF-8 form.
    make_folder(target.parent)
    write_atomic(target, page.encode("utf-8", "replace").decode())
    return target


def current_results(run: Path) -> Results:
    """``results.json`` where it was made from the stages as they are; else collected afresh."""
    written = read_json(RunDir(run).results)
    if written and written.get("made_from") == made_from(run):
        return written
    return collect(run)


def render(run: Path, results: Results) -> str:
    """The page's text."""
    style = (_TEMPLATES / "style.css").read_text()
    script = (_TEMPLATES / "page.js").read_text()
    environment = Environment(
        loader=PackageLoader("insightv.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"pct": pct, "count": count, "signed": signed}
    shown = gallery(run)
    main = main_benchmark(results)
    return environment.get_template("index.html").render(
        policy=(
            f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
            f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
        ),
        style=Markup(style),
        script=Markup(script),
        results=results,
        main=main,
        headline=headline(results),
        ladder=drawings.ladder(results),
        table=ladder_table(results),
        tasks=task_table(results),
        differences=drawings.differences(results),
        confusion=confusion(results),
        card=drawings.card(results),
        benchmarks=paper_tables(found) if (found := read_scores(run)) else [],
        examples=examples(run, main),
        funnel=drawings.funnel(results),
        distributions=drawings.distributions(results),
        agreement=drawings.agreement(results),
        training=training(run, results),
        gallery=shown,
        rounds=list(dict.fromkeys(path["round"] for path in shown["paths"])),
        stages=list(stage_rows(run)),
        provenance=provenance(run),
    )


def training(run: Path, results: Results) -> list[list[Markup]]:
    """Rows of panels: trainings with a loss alone share one, each other has its own."""
    drawn = [
        drawings.curves(stage, read_metrics(run / entry["file"]))
        for stage, entry in sorted(results["training"].items(), key=_by_round)
    ]
    alone = [panel for panels in drawn if len(panels) == 1 for panel in panels]
    return [row for row in (alone, *(panels for panels in drawn if len(panels) > 1)) if row]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _by_round(item: tuple[str, Any]) -> tuple[int, str]:
    return rank_of_round(item[0]), item[0]


def pct(value: float | None, digits: int = 1) -> str:
    """``61.2``: a fraction in per cent, without the sign; a dash for what is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def signed(value: float | None) -> str:
    """``+4.1``: a difference of fractions in points."""
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "\u2212")


def count(value: int | None) -> str:
    """``12,345``; a dash for what is not known."""
    return "–" if value is None else f"{value:,}"


def main_benchmark(results: Results) -> str:
    """The question set the run trains for; empty while there are no questions."""
    return results["benchmarks"][0] if results["benchmarks"] else ""


def headline(results: Results) -> list[tuple[str, str]]:
    """The run in a few numbers, those that are known; gains under the names of their entries."""
    numbers = results["funnel"]
    found: list[tuple[str, str]] = []
    if numbers["questions"] is not None:
        found.append((count(numbers["questions"]), "training questions"))
    if numbers["rounds"]:
        paths = sum(row["paths"] for row in numbers["rounds"])
        found.append((count(paths), f"reasoning paths in {_rounds(len(numbers['rounds']))}"))
    pairs = [row["pairs"] for row in numbers["rounds"] if row["pairs"] is not None]
    if pairs:
        found.append((count(sum(pairs)), "preference pairs"))
    gains = {(row["entry"], row["other"], row["benchmark"]): row for row in results["differences"]}
    main = main_benchmark(results)
    for entry in ("multi_agent", "iterative_dpo"):  # after SFT, and at the end of the chain
        gain = gains.get((entry, "base", main))
        if gain and gain["difference"] is not None:
            low, high = gain["ci95"]
            told = f"points on {main}, {entry} over base [{signed(low)}, {signed(high)}]"
            found.append((signed(gain["difference"]), told))
    return found


def _rounds(number: int) -> str:
    return "1 round" if number == 1 else f"{number} rounds"


def ladder_table(results: Results) -> list[dict[str, Any]]:
    """One row an entry: its cell on every benchmark, its tokens and the paper's numbers."""
    cells: dict[str, dict[str, Any]] = {}
    for row in results["ladder"]:
        cells.setdefault(row["name"], {})[row["benchmark"]] = row
    return [
        {"name": name, "cells": [row.get(benchmark) for benchmark in results["benchmarks"]]}
        for name, row in cells.items()
    ]


def task_table(results: Results) -> dict[str, Any]:
    """Accuracy by task on the main benchmark: a row a task, a column an entry."""
    main = main_benchmark(results)
    by_entry = {name: tasks.get(main, {}) for name, tasks in results["tasks"].items()}
    names = sorted({task for tasks in by_entry.values() for task in tasks})
    return {
        "entries": list(by_entry),
        "rows": [
            (
                task,
                max(tasks[task]["n"] for tasks in by_entry.values() if task in tasks),
                [tasks.get(task, {}).get("accuracy") for tasks in by_entry.values()],
            )
            for task in names
        ],
    }


def confusion(results: Results) -> list[dict[str, Any]]:
    """Each entry's matrix reasoning × answer, with shares of the entry's decided questions."""
    tables = []
    for entry, counts in results["confusion"].items():
        cells = [
            [
                counts.get(f"reasoning_{reasoning}_answer_{answer}", 0)
                for answer in ("right", "wrong")
            ]
            for reasoning in ("right", "wrong")
        ]
        total = sum(map(sum, cells))
        tables.append(
            {
                "entry": entry,
                "cells": cells,
                "total": total,
                "undecided": sum(counts.values()) - total,
                "levels": [
                    [min(9, round(9 * value / total)) if total else 0 for value in row]
                    for row in cells
                ],
                "rescued": cells[1][0] / sum(cells[1]) if sum(cells[1]) else None,
                "spoiled": cells[0][1] / sum(cells[0]) if sum(cells[0]) else None,
            }
        )
    return tables


def examples(run: Path, main: str) -> dict[str, Any] | None:
    """One question that direct SFT gets wrong and both agents right, and one the other way round.

    Both are drawn by hash among all such questions of the main benchmark.
    """
    entries = ("direct_sft", "multi_agent")
    stages = [eval_stage(entry) for entry in entries]
    if not all(complete(run, stage) for stage in stages):
        return None
    direct, agents = (
        {
            row["question"]: row["correct"]
            for row in shards.read_rows(shard_folder(run, stage))
            if row["correct"] is not None
        }
        for stage in stages
    )
    both = sorted(direct.keys() & agents.keys(), key=rank)
    both = [key for key in both if key.startswith(f"{main}:")]
    gained = [key for key in both if agents[key] and not direct[key]]
    lost = [key for key in both if direct[key] and not agents[key]]
    chosen = [keys[0] for keys in (gained, lost) if keys]
    shown: dict[str, dict[str, Any]] = {key: {} for key in chosen}
    for entry, stage in zip(entries, stages, strict=True):
        for row in shards.read_rows(shard_folder(run, stage)):
            if row["question"] in shown:
                shown[row["question"]][entry] = _side(Prediction.from_json(row))
    asked: dict[str, Question] = {}
    for stage in QUESTIONS:
        asked |= questions(run, stage, set(chosen))
    return {
        "compared": len(both),
        "gained": len(gained),
        "lost": len(lost),
        "shown": [_example(run, asked[key], shown[key]) for key in chosen if key in asked],
    }


def _side(prediction: Prediction) -> dict[str, Any]:
    """What one entry wrote."""
    return {
        "steps": parse_steps(prediction.reasoning).steps,
        "text": prediction.reasoning,
        "reasoning_answer": prediction.reasoning_answer,
        "reasoning_correct": prediction.reasoning_correct,
        "answer": prediction.answer,
        "correct": prediction.correct,
        "tokens": prediction.tokens,
    }


def _example(run: Path, question: Question, sides: Mapping[str, Any]) -> dict[str, Any]:
    stored = store(run)
    return {
        "question": question,
        "pictures": [data_uri(stored, picture) for picture in question.pictures],
        "direct": sides["direct_sft"],
        "agents": sides["multi_agent"],
    }


def stage_rows(run: Path) -> Iterator[dict[str, Any]]:
    """Every stage with what it holds, how long it took, and on a cluster what it used."""
    found = RunDir(run)
    hours = by_stage(found, spent(found.read_jobs(), None, time.time()))
    for stage in stage_names(run):
        manifest = found.read_manifest(stage) or {}
        sidecars = shards.sidecars(shard_folder(run, stage)).values()
        yield {
            "name": stage,
            "state": _state(manifest),
            "shards": len(sidecars),
            "rows": sum(sidecar.rows for sidecar in sidecars),
            "bytes": sum(sidecar.bytes for sidecar in sidecars),
            "seconds": round(manifest["seconds"]) if "seconds" in manifest else None,
            "tokens": manifest.get("sums", {}).get("tokens"),
            **(used(hours[stage], manifest) if stage in hours and manifest else {}),
        }


def _state(manifest: Mapping[str, Any]) -> str:
    if skipped := manifest.get("skipped"):
        return f"skipped by {skipped['by']}"
    return "complete" if manifest else "not complete"


def provenance(run: Path) -> dict[str, str]:
    """When, by which code and on what the run was last started."""
    starts = (read_json(RunDir(run).provenance) or {}).get("starts", [])
    if not starts:
        return {}
    last = starts[-1]
    host = last.get("host") or {}
    found = {
        "started": last.get("time"),
        "code": ", ".join(
            f"{name} {code.get('commit', code.get('sources', ''))[:12]}"
            + (" (changed)" if code.get("changed") else "")
            for name, code in (last.get("code") or {}).items()
        ),
        "python": last.get("python"),
        "machine": f"{host.get('platform', '')}, {host.get('cores', '?')} cores" if host else None,
        "image": json.dumps(last["image"]) if last.get("image") else None,
        "images of single stages": json.dumps(last["images"]) if last.get("images") else None,
        "starts": str(len(starts)),
    }
    return {name: str(value) for name, value in found.items() if value}
