"""The embedded model's own paths, written during its pretraining for its scorer to learn from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from insightv.demo import tiny
from insightv.demo.asking import Ask
from insightv.demo.charts import Chart, draw
from insightv.demo.lessons import PROMPTS, draw_any
from insightv.records import Step
from insightv.steps import parse_steps


@dataclass(frozen=True)
class Sampled:
    """Paths the model wrote for one question about a chart it has never seen."""

    chart: Chart
    question: Ask
    paths: tuple[Sequence[Step], ...]


@torch.no_grad()
def sample_own_paths(
    model: Any,
    tokenizer: Any,
    rng: random.Random,
    make: Callable[[random.Random], Chart],
    questions: int = 640,
    paths: int = 4,
    temperature: float = 0.9,
) -> list[Sampled]:
    """Samples several paths for each of many questions about fresh random charts."""
    batch, collected = 32, []
    for _ in range(0, questions, batch):
        charts = [make(rng) for _ in range(batch)]
        asked = [draw_any(chart.table, rng) for chart in charts]
        texts = write_steps(model, tokenizer, charts, asked, paths, temperature)
        for k, (chart, question) in enumerate(zip(charts, asked, strict=True)):
            parsed = [parse_steps(text).steps for text in texts[k * paths : (k + 1) * paths]]
            whole = tuple(steps for steps in parsed if steps and steps[-1].next_action == "summary")
            if whole:
                collected.append(Sampled(chart, question, whole))
    return collected


@torch.no_grad()
def write_steps(
    model: Any,
    tokenizer: Any,
    charts: Sequence[Chart],
    asked: Sequence[Ask],
    paths: int,
    temperature: float,
) -> list[str]:
    """The model's step lines for each question, ``paths`` of them in a row."""
    prompts = [
        "<s><user>" + "<image>" * tiny.TOKENS + PROMPTS.render("reasoning", question=q.text)
        for q in asked
    ]
    encoded = tokenizer(
        [prompt + "<assistant>" for prompt in prompts],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    )
    pixels = np.stack([np.asarray(draw(chart)) for chart in charts])
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1,
            max_new_tokens=110,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            num_return_sequences=paths,
            pad_token_id=tokenizer.pad_token_id,
        )
    replies = out[:, encoded["input_ids"].shape[1] :]
    return tokenizer.batch_decode(replies, skip_special_tokens=True)
