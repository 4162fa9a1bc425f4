"""What the embedded model can do, on fresh charts of random values: the card's figures.

    python benchmarks/tiny_base.py [--model FOLDER] [--questions 40]

Prints and writes benchmarks/results/tiny_base.json: transcription, direct answers and
answers by steps for each task, pass@4 and majority at T 0.8, and how well its own scores
choose among four paths.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from insightv.assessment.marks import parse_scores
from insightv.assessment.scoring import render_paths
from insightv.demo.asking import TASKS, Ask, ask, ask_table, ask_value
from insightv.demo.charts import Chart, draw
from insightv.demo.lessons import PROMPTS
from insightv.demo.pretrain import FOLDER
from insightv.demo.teaching import random_chart
from insightv.steps import parse_steps, render_steps

BATCH = 64


class Reader:
    """Greedy or sampled replies to prompts about charts."""

    def __init__(self, folder: Path):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).float().eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def __call__(self, charts, prompts, tokens, temperature=0.0):
        out = []
        for start in range(0, len(charts), BATCH):
            texts = [f"<s><user><image>{p}<assistant>" for p in prompts[start : start + BATCH]]
            images = [draw(chart) for chart in charts[start : start + BATCH]]
            inputs = self.processor(text=texts, images=images, return_tensors="pt", padding=True)
            how = {"do_sample": False}
            if temperature:
                how = {"do_sample": True, "temperature": temperature, "top_k": 0}
            with torch.autocast("cpu", torch.bfloat16):
                ids = self.model.generate(**inputs, max_new_tokens=tokens, pad_token_id=0, **how)
            replies = ids[:, inputs["input_ids"].shape[1] :]
            out += self.processor.tokenizer.batch_decode(replies, skip_special_tokens=True)
        return out


def concluded(text: str) -> str | None:
    """The answer a path's last step states; None if it is not a whole path."""
    steps = parse_steps(text).steps
    if not steps or steps[-1].next_action != "summary":
        return None
    return steps[-1].content.removeprefix("answer ").strip()


def draw_questions(count: int, seed: int) -> list[tuple[Chart, Ask]]:
    rng, drawn = random.Random(seed), []
    for task in TASKS:
        found = 0
        while found < count:
            chart = random_chart(rng)
            question = ask(chart.table, rng, task)
            if question is not None:
                drawn.append((chart, question))
                found += 1
    return drawn


def by_task(drawn, right) -> dict[str, float]:
    sums = defaultdict(list)
    for (_, question), hit in zip(drawn, right, strict=True):
        sums[question.task].append(hit)
        sums["all"].append(hit)
    return {task: round(float(np.mean(hits)), 3) for task, hits in sums.items()}


def auc(scores, labels) -> float:
    """How often a right path scores above a wrong one; a tie counts half.

    Args:
        scores: For each question, the scores of its paths.
        labels: For each question, which of its paths are right.
    """
    wins = pairs = 0.0
    for own, right in zip(scores, labels, strict=True):
        good = [s for s, label in zip(own, right, strict=True) if label]
        bad = [s for s, label in zip(own, right, strict=True) if not label]
        wins += sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
        pairs += len(good) * len(bad)
    return round(wins / max(1, pairs), 3)


def measure(folder: Path, count: int) -> dict:
    read, rng, result = Reader(folder), random.Random(4242), {}
    charts = [random_chart(rng) for _ in range(256)]
    prompts = [PROMPTS.render("direct", question=ask_table(c.table).text) for c in charts]
    tables = read(charts, prompts, 32)
    exact = [t == ask_table(c.table).answer for c, t in zip(charts, tables, strict=True)]
    result["transcribed exactly"] = {
        kind: round(
            float(np.mean([e for e, c in zip(exact, charts, strict=True) if c.style.kind == kind])),
            3,
        )  # fmt: skip
        for kind in ("bar", "hbar", "line", "lollipop", "table")
    } | {"all": round(float(np.mean(exact)), 3)}
    asked = [ask_value(c.table, rng.choice(c.labels)) for c in charts]
    values = read(charts, [PROMPTS.render("direct", question=q.text) for q in asked], 4)
    result["value"] = round(
        float(np.mean([v == q.answer for v, q in zip(values, asked, strict=True)])), 3
    )
    drawn = draw_questions(count, 99)
    charts, questions = [c for c, _ in drawn], [q for _, q in drawn]
    truths = [q.answer for q in questions]
    replies = read(charts, [PROMPTS.render("direct", question=q.text) for q in questions], 24)
    result["direct"] = by_task(drawn, [r == t for r, t in zip(replies, truths, strict=True)])
    ask_steps = [PROMPTS.render("reasoning", question=q.text) for q in questions]
    greedy = [concluded(text) for text in read(charts, ask_steps, 110)]
    result["steps"] = by_task(drawn, [g == t for g, t in zip(greedy, truths, strict=True)])
    torch.manual_seed(0)
    texts = [read(charts, ask_steps, 110, 0.8) for _ in range(4)]
    found = [[concluded(t) for t in four] for four in zip(*texts, strict=True)]
    right = [[f == t for f in four] for four, t in zip(found, truths, strict=True)]
    result["sampled, T 0.8"] = by_task(drawn, [float(np.mean(r)) for r in right])
    result["pass@4"] = by_task(drawn, [any(r) for r in right])
    majority = [max(four, key=four.count) for four in found]  # of equals, the first written
    result["majority of 4"] = by_task(
        drawn, [m == t for m, t in zip(majority, truths, strict=True)]
    )
    result |= scored(read, drawn, list(zip(*texts, strict=True)), right)
    return result


def scored(read, drawn, texts, right) -> dict:
    """The scorer's choice among the four paths, and its AUC over all of them."""
    shown = [render_paths([render_steps(parse_steps(t).steps) for t in four]) for four in texts]
    prompts = [
        PROMPTS.render("score", question=q.text, paths=s, count=4)
        for (_, q), s in zip(drawn, shown, strict=True)
    ]
    replies = read([c for c, _ in drawn], prompts, 90)
    best, scores, labels, parsed = [], [], [], 0
    for reply, hits in zip(replies, right, strict=True):
        marks, _ = parse_scores(reply, 4)
        totals = [marks[k].total if k in marks else 0 for k in range(1, 5)]
        parsed += len(marks) == 4
        best.append(hits[int(np.argmax(totals))])
        scores.append(totals)
        labels.append(hits)
    return {
        "scores parsed": round(parsed / len(drawn), 3),
        "score AUC": auc([sum(scores, [])], [sum(labels, [])]),
        "score AUC within a question": auc(scores, labels),
        "best of 4 by score": by_task(drawn, best),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--questions", type=int, default=40, help="for each task")
    options = parser.parse_args()
    result = measure(options.model, options.questions)
    print(json.dumps(result, indent=1))
    out = Path(__file__).parent / "results" / "tiny_base.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
