"""How far the rules of the answer judge can be trusted, and how much they leave open.

    python benchmarks/judging.py [--part dev] [--out FOLDER]
    python benchmarks/judging.py --chain CHAIN [KEY=VALUE …]

Judges every labelled pair by rule alone and compares with its label, which was set by hand
before a rule was run on it. judging/first.jsonl is cut in two by a hash of the question: rules
were mended on ``dev``, then run on ``test``, and what that told was mended too.
judging/fresh.jsonl was labelled after that, and no rule was ever changed for what it told: it
says what the rules are worth. judging/later.jsonl was labelled last; rules were mended on it.
Prints and writes results/judging.json and judging.md.

Precision of *right*: of the answers that rules call right, the share that are. Recall of
*right*: of the right answers, the share that rules call right. The same for *wrong*. *Left*:
the share no rule decides, which goes to a language model. With a chain its judge is asked about
them, as in a run, the tables are of both together, and nothing is written. Intervals are 95 %, by
resampling questions, since one question has several answers.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.metadata
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from insightv.assessment.judge import Judge
from insightv.assessment.rules import Decision, decide
from insightv.chainfile import read
from insightv.evaluation.statistics import accuracy
from insightv.folders import model_folder
from insightv.pictures import Pictures
from insightv.prompting import load_prompts
from insightv.records import Question

HERE = Path(__file__).parent
FIRST = HERE / "judging" / "first.jsonl"
WHOLE = {HERE / "judging" / f"{part}.jsonl": part for part in ("fresh", "later")}
PARTS = ("dev", "test", *WHOLE.values())


@dataclass(frozen=True)
class Judged:
    """A labelled pair and what the rules made of it."""

    question: Question
    given: str
    right: bool
    kind: str
    part: str
    decision: Decision

    @property
    def error(self) -> bool:
        return self.decision.correct is not None and self.decision.correct != self.right


def part_of(path: Path, question: str) -> str:
    """All answers to a question belong to one part."""
    if path in WHOLE:
        return WHOLE[path]
    return PARTS[hashlib.sha256(question.encode()).digest()[0] % 2]


def judge(path: Path) -> list[Judged]:
    judged = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        part = part_of(path, row["question"])
        question = Question(
            key=f"judging:{part}:{number}",
            text=row["question"],
            pictures=(),
            answer=row["truth"],
            answer_type=row["type"],
            options=tuple(row.get("options", ())),
            task=row.get("task", ""),
        )
        decision = decide(question, row["given"])
        judged.append(Judged(question, row["given"], row["right"], row["kind"], part, decision))
    return judged


async def ask(judged: Sequence[Judged], chain: Path, overrides: Sequence[str]) -> list[Judged]:
    """The same, with what a chain's judge says of those that the rules leave open."""
    from insightv.engines import load_engine

    config = read(chain, overrides)
    model = config.models.judge
    engine = load_engine(model_folder(model.path), model.engine or config.engine, Pictures([]))
    llm = Judge(engine, load_prompts(model.prompts), config.judge, config.seed)
    try:
        said = await asyncio.gather(*(llm.decide_answer(r.question, r.given) for r in judged))
    finally:
        await llm.close()
    return [replace(row, decision=decision) for row, decision in zip(judged, said, strict=True)]


def measures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Shares with their intervals; None where there is nothing to take a share of."""

    def share(
        among: Callable[[Judged], bool], of: Callable[[Judged], bool]
    ) -> dict[str, float | int] | None:
        rows = [row for row in judged if among(row)]
        if not rows:
            return None
        found = accuracy([of(row) for row in rows], [row.question.text for row in rows])
        ends = {"low": round(found.low, 4), "high": round(found.high, 4)}
        return {"value": round(found.value, 4), **ends, "n": len(rows)}

    def called(outcome: bool) -> Callable[[Judged], bool]:
        return lambda row: row.decision.correct is outcome

    def labelled(outcome: bool) -> Callable[[Judged], bool]:
        return lambda row: row.right is outcome

    return {
        "n": len(judged),
        "questions": len({row.question.text for row in judged}),
        "errors": sum(row.error for row in judged),
        "left": share(lambda _: True, lambda row: row.decision.correct is None),
        "right": {
            "precision": share(called(True), labelled(True)),
            "recall": share(labelled(True), called(True)),
        },
        "wrong": {
            "precision": share(called(False), labelled(False)),
            "recall": share(labelled(False), called(False)),
        },
    }


def tables(judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
    """The measures of each part, each type of answer, each kind and each deciding rule."""
    split: dict[str, dict[str, list[Judged]]] = defaultdict(lambda: defaultdict(list))
    for row in judged:
        split["part"][row.part].append(row)
        split["part"]["all"].append(row)
        split["answer type"][row.question.answer_type].append(row)
        split["kind"][row.kind].append(row)
        split["rule"][row.decision.rule].append(row)
    return {
        by: {name: measures(groups[name]) for name in sorted(groups, key=_place)}
        for by, groups in split.items()
    }


def _place(name: str) -> tuple[int, str]:
    """Parts in the order they were labelled; everything else by name."""
    return (PARTS.index(name) if name in PARTS else len(PARTS)), name


def errors(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    return [
        {
            "part": row.part,
            "type": row.question.answer_type,
            "kind": row.kind,
            "question": row.question.text,
            "truth": row.question.answer,
            "given": row.given,
            "label": "right" if row.right else "wrong",
            "rules": "right" if row.decision.correct else "wrong",
            "rule": row.decision.rule,
        }
        for row in judged
        if row.error
    ]


def render(result: dict[str, Any]) -> str:
    """The tables in Markdown."""

    def shown(share: dict[str, Any] | None) -> str:
        if share is None:
            return "–"
        value, low, high = (f"{100 * share[name]:.0f}" for name in ("value", "low", "high"))
        return f"{value} % [{low}, {high}]"

    lines = [
        "<!-- Written by benchmarks/judging.py. -->",
        f"{result['pairs']} pairs; math-verify {result['math-verify'] or 'not installed'}.",
    ]
    for by, rows in result["tables"].items():
        lines += [
            "",
            f"| {by} | pairs | errors | left to the LLM "
            "| *right*: precision | recall | *wrong*: precision | recall |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            cells = [row["left"]]
            cells += [row[side][what] for side in ("right", "wrong") for what in row[side]]
            told = " | ".join(map(shown, cells))
            lines.append(f"| {name} | {row['n']} | {row['errors']} | {told} |")
    lines += ["", "Every error:", ""]
    lines += [
        "| part | question | truth | given | label | rules say |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["errors"]:
        cells = [row["part"], row["question"], row["truth"], row["given"], row["label"]]
        cells.append(f"{row['rules']} (`{row['rule']}`)")
        told = (cell.replace("|", "\\|").replace("\n", " ⏎ ") for cell in cells)
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--part", choices=PARTS, help="look at one part only, and write nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--chain", type=Path, help="ask the judge of this chain, too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="over what it says")
    asked = parser.parse_args()
    judged = [row for path in (FIRST, *WHOLE) for row in judge(path)]
    if asked.part:
        judged = [row for row in judged if row.part == asked.part]
        undecided = Counter(r.decision.detail for r in judged if r.decision.correct is None)
        print("left open:", *(f"{n} {why}" for why, n in undecided.most_common()), sep="\n  ")
    if asked.chain:
        judged = asyncio.run(ask(judged, asked.chain, asked.overrides))
    result = {
        "pairs": len(judged),
        "math-verify": version("math-verify"),
        "tables": tables(judged),
        "errors": errors(judged),
    }
    text = render(result)
    print(text)
    if not asked.part and not asked.chain:
        (asked.out / "judging.json").write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (asked.out / "judging.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
