"""The embedded model: its tokenizer, its folder, and what it can do."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import insightv
from insightv.assessment.scoring import Marks, render_scores
from insightv.demo.asking import TASKS, ask, worked_steps
from insightv.demo.charts import draw
from insightv.demo.lessons import draw_question, mixed_lessons, scoring_lesson
from insightv.demo.tables import vocabulary
from insightv.demo.teaching import random_chart
from insightv.steps import render_steps

FOLDER = Path(insightv.__file__).parent / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    return model.float().eval(), AutoProcessor.from_pretrained(FOLDER)


def through(tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**9))
def test_lessons_survive_the_tokenizer(seed):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rng = random.Random(seed)
    chart = random_chart(rng)
    for lesson in [*mixed_lessons(chart, rng), scoring_lesson(chart, rng)]:
        for turn in lesson.turns:
            assert through(tokenizer, turn) == turn


def test_lessons_need_no_letters(tokenizer):
    """Every word of a lesson is one token: nothing is spelt, nothing falls back to bytes."""
    rng = random.Random(5)
    letters = {chr(code) for code in range(ord("A"), ord("z") + 1)}
    for _ in range(200):
        chart = random_chart(rng)
        for lesson in [*mixed_lessons(chart, rng), scoring_lesson(chart, rng)]:
            for turn in lesson.turns:
                spelt = letters & set(tokenizer.tokenize(turn))
                assert not spelt, (turn, spelt)


def test_labels_and_numbers_are_single_tokens(tokenizer):
    for word in [*vocabulary(), *map(str, range(101))]:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


def test_text_outside_the_vocabulary_survives(tokenizer):
    for text in ("Zürich <b>123</b>", "{}[]", "Ärger: 𝄞", "a  b"):
        assert through(tokenizer, text) == text


def test_scores_survive_the_tokenizer(tokenizer):
    text = render_scores([Marks(95, 50, 45, 45, (1, 3)), Marks(95, 95, 95, 95)])
    assert through(tokenizer, text) == text
    assert len(tokenizer.tokenize(text)) < 40


def test_folder_is_small_and_plain():
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert (FOLDER / "model.safetensors").is_file() and (FOLDER / "README.md").is_file()
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "llava"


def test_chat_template_matches_the_lessons(loaded):
    """The tokens the model was taught are those the processor makes of a chat."""
    _, processor = loaded
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Table. Steps."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "5"}]},
        {"role": "user", "content": [{"type": "text", "text": "Answer."}]},
    ]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s><user><image>Table. Steps.<assistant>5</s><user>Answer.<assistant>"


def answer_of(model, processor, image, prompt: str, tokens: int) -> str:
    text = f"<s><user><image>{prompt}<assistant>"
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    reply = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(reply, skip_special_tokens=True)


def test_it_reads_charts_it_has_never_seen(loaded):
    """Many fresh random charts are transcribed to the letter; a blank one is not."""
    model, processor = loaded
    rng, exact = random.Random(77), 0
    charts = [random_chart(rng) for _ in range(40)]
    for chart in charts:
        wanted = ", ".join(f"{label} {value}" for label, value in chart.table.items())
        prompt = "List every label with its value. Answer."
        exact += answer_of(model, processor, draw(chart), prompt, 30) == wanted
    assert exact >= 24, f"{exact} of {len(charts)} charts"
    blank = draw(charts[0]).point(lambda _: 255)
    wanted = ", ".join(f"{label} {value}" for label, value in charts[0].table.items())
    assert (
        answer_of(model, processor, blank, "List every label with its value. Answer.", 30) != wanted
    )


def test_it_writes_steps(loaded):
    model, processor = loaded
    rng, sound = random.Random(78), 0
    for _ in range(12):
        chart = random_chart(rng)
        question = draw_question(chart.table, rng)
        text = answer_of(model, processor, draw(chart), f"{question.text} Steps.", 110)
        lines = [json.loads(line) for line in text.split("\n") if line.startswith("{")]
        sound += len(lines) >= 2 and lines[-1]["next_action"] == "summary"
    assert sound >= 10


def test_every_task_has_steps_that_end_in_its_answer():
    rng = random.Random(3)
    for task in TASKS:
        question = None
        while question is None:
            chart = random_chart(rng)
            question = ask(chart.table, rng, task)
        steps = worked_steps(question, chart.table, rng)
        assert steps[-1].content == f"answer {question.answer}"
        assert render_steps(steps).count("\n") == len(steps) - 1
