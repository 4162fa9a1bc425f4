"""Charts say what their tables say; questions about them are solved again, independently."""

import math
import random
import re
from fractions import Fraction
from itertools import combinations

import pytest
from PIL import Image, ImageChops

from insightv.demo import charts
from insightv.demo.asking import TASKS, ask, ask_table, ask_value, solve, worked_steps
from insightv.demo.charts import KINDS, LARGEST, SIZE, Chart, draw, encode_png, make_chart
from insightv.demo.sets import _marks
from insightv.demo.tables import tables, vocabulary


def random_table(rng: random.Random) -> dict[str, int]:
    """A piece of a real table, or hard random numbers with ties and extremes."""
    if rng.random() < 0.5:
        return dict(_marks(rng.choice(tables()), rng))
    labels = rng.sample(vocabulary(), rng.randint(3, 6))
    high = rng.choice((2, 5, 40))
    return {label: rng.randint(1, high) for label in labels}


def half_up(quotient: Fraction) -> str:
    tenths = math.floor(quotient * 10 + Fraction(1, 2))
    return str(tenths // 10) if tenths % 10 == 0 else f"{tenths // 10}.{tenths % 10}"


def solve_again(text: str, table: dict[str, int]) -> str:
    """The answer, from the words of the question alone."""
    names, values = list(table), list(table.values())

    def said(pattern: str) -> list[str] | None:
        match = re.fullmatch(pattern, text)
        return list(match.groups()) if match else None

    if text == "What is the difference between the highest and the lowest?":
        return str(sorted(values)[-1] - sorted(values)[0])
    if text == "What do the two highest add up to?":
        return str(sum(sorted(values)[-2:]))
    if m := said(r"(?:How far apart are|What is the difference between) (\w+) and (\w+)\?"):
        return str(abs(table[m[0]] - table[m[1]]))
    if m := said(r"How much are (\w+) and (\w+) together\?|What is the sum of (\w+) and (\w+)\?"):
        return str(sum(table[name] for name in m if name))
    if m := said(r"How many times as large as (\w+) is (\w+)\?"):
        return half_up(Fraction(table[m[1]], table[m[0]]))
    if m := said(r"How many are (?:larger than|above) (\d+)\?"):
        return str(len([v for v in values if v > int(m[0])]))
    if m := said(r"Which is the (highest|lowest)\?"):
        best = (max if m[0] == "highest" else min)(values)
        (label,) = [name for name in names if table[name] == best]
        return label
    if m := said(r"Order from (highest to lowest|lowest to highest)\."):
        assert len(set(values)) == len(values)
        ranked = sorted((v, name) for name, v in table.items())
        ranked = ranked[::-1] if m[0].startswith("highest") else ranked
        return ", ".join(name for _, name in ranked)
    trend = r"From (\w+) to (\w+) do the values \(A\) only rise, \(B\) only fall, \(C\) neither\?"
    if m := said(trend):
        part = values[names.index(m[0]) : names.index(m[1]) + 1]
        assert len(part) >= 3
        if part == sorted(set(part)):
            return "A"
        return "B" if part == sorted(set(part))[::-1] else "C"
    if text == "Which changed most from the one before?":
        moves = sorted((abs(values[k] - values[k - 1]), names[k]) for k in range(1, len(values)))
        assert moves[-1][0] > moves[-2][0]
        return moves[-1][1]
    if m := said(r"Is (\w+) more than twice (\w+)\?"):
        return "yes" if table[m[0]] > table[m[1]] + table[m[1]] else "no"
    if m := said(r"Which is closest to (\d+)\?"):
        gaps = sorted((abs(v - int(m[0])), name) for name, v in table.items())
        assert gaps[0][0] < gaps[1][0]
        return gaps[0][1]
    if m := said(r"What is the value of (\w+)\?"):
        return str(table[m[0]])
    if text == "List every label with its value.":
        return ", ".join(f"{name} {v}" for name, v in table.items())
    raise AssertionError(f"the test does not know the question {text!r}")


@pytest.mark.parametrize("task", TASKS)
def test_stated_answers_are_the_true_ones(task):
    rng = random.Random(task)
    asked = 0
    for _ in range(600):
        table = random_table(rng)
        question = ask(table, rng, task)
        if question is None:
            continue
        asked += 1
        assert question.task == task
        assert question.answer == solve_again(question.text, table), (question, table)
        assert solve(question, table) == question
        assert set(question.needed) <= set(table)
    assert asked >= 100


def test_reading_questions():
    rng = random.Random(1)
    for _ in range(100):
        table = random_table(rng)
        for question in (ask_table(table), ask_value(table, rng.choice(list(table)))):
            assert question.answer == solve_again(question.text, table)


@pytest.mark.parametrize("task", TASKS)
def test_answers_have_the_form_of_their_type(task):
    rng = random.Random(task)
    answers = set()
    for _ in range(300):
        table = random_table(rng)
        question = ask(table, rng, task)
        if question is None:
            continue
        answers.add(question.answer)
        if question.answer_type == "number":
            assert re.fullmatch(r"\d+(\.[1-9])?", question.answer)
        elif question.answer_type == "label":
            assert question.answer in table
        elif question.answer_type == "yes_no":
            assert question.answer in ("yes", "no")
        elif question.answer_type == "choice":
            letters = [chr(ord("A") + k) for k in range(len(question.options))]
            assert letters.count(question.answer) == 1
            assert len(set(question.options)) == len(question.options)
            for letter, option in zip(letters, question.options, strict=True):
                assert f"({letter}) {option}" in question.text
        else:
            assert sorted(question.answer.split(", ")) == sorted(table)
    assert len(answers) > 1, "always the same answer"


def check_line(content: str) -> None:
    """Arithmetic and comparisons stated in a line of work hold."""
    operations = {"-": lambda a, b: str(a - b), "+": lambda a, b: str(a + b)}
    operations |= {"/": lambda a, b: half_up(Fraction(a, b)), "x": lambda a, b: str(a * b)}
    found = re.findall(r"(\d+) ([-+/x]) (\d+) = (\d+(?:\.\d)?)", content)
    for left, sign, right, result in found:
        assert operations[sign](int(left), int(right)) == result, content
    for left, sign, right in re.findall(r"(\d+) ([<>]) (\d+)", content):
        assert (int(left) > int(right)) == (sign == ">") and left != right, content
    assert found or not re.search(r"\d [-+/x] \d", content)


@pytest.mark.parametrize("task", TASKS)
def test_worked_steps_read_the_table_and_reckon_rightly(task):
    rng = random.Random(f"steps {task}")
    shapes = set()
    for _ in range(300):
        table = random_table(rng)
        question = ask(table, rng, task)
        if question is None:
            continue
        steps = worked_steps(question, table, rng)
        read: dict[str, int] = {}
        for step in steps:
            if step.title.startswith("Read"):
                pairs = re.findall(r"(\w+) (\d+)(?:, |$)", step.content)
                assert ", ".join(" ".join(pair) for pair in pairs) == step.content
                assert not set(dict(pairs)) & set(read), "read twice"
                read |= {label: int(value) for label, value in pairs}
            else:
                check_line(step.content)
            assert step.title and step.content
        assert set(question.needed) <= set(read)
        assert all(table[label] == value for label, value in read.items())
        assert steps[-1].content == f"answer {question.answer}"
        assert [step.next_action for step in steps[:-1]] == ["continue"] * (len(steps) - 1)
        assert steps[-1].next_action == "summary"
        numbers = {str(value) for value in table.values()} | set(re.findall(r"\d+", question.text))
        for step in steps:
            if step.title in ("Add", "Divide") or (
                step.title == "Subtract" and " = " in step.content
            ):
                assert set(re.findall(r"\d+", step.content.split(" = ")[0])) <= numbers
        shapes.add(tuple(step.title for step in steps))
    assert len(shapes) >= 4, "paths do not vary"


def test_lines_of_work_state_what_they_claim():
    """Sort, compare and the differences of ``change`` and ``closest``, for one known table."""
    table = {"Q1": 5, "Q2": 12, "Q3": 3, "Q4": 9}
    rng = random.Random(0)
    work = {}
    for task in TASKS:
        question = None
        while question is None:
            question = ask(table, rng, task)
        work[task] = " | ".join(content for _, content in question.work)
    assert work["change"] == "Q2 7, Q3 9, Q4 6 | largest 9"
    assert work["order"] in ("Q2 12, Q4 9, Q1 5, Q3 3", "Q3 3, Q1 5, Q4 9, Q2 12")
    assert work["extreme"] in ("highest 12", "lowest 3")
    assert work["range"] == "highest 12, lowest 3 | 12 - 3 = 9"
    assert work["top_two"] == "highest 12, then 9 | 12 + 9 = 21"


# Pictures.


def printed_boxes(chart: Chart, monkeypatch) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """The picture, with the box of every text as the drawing asked for it, unclipped."""
    boxes = []
    real = charts._print

    def spy(image, text, x, y, ink):
        boxes.append((x, y, x + text.width, y + text.height))
        real(image, text, x, y, ink)

    with monkeypatch.context() as patch:
        patch.setattr(charts, "_print", spy)
        return draw(chart), boxes


def extreme_charts(count: int = 400) -> list[Chart]:
    """Widest labels, six marks, largest and smallest values, every kind."""
    rng = random.Random(3)
    wide = sorted(vocabulary(), key=lambda label: -charts._glyph(label, 10).width)
    made = []
    for n in range(count):
        labels = rng.sample(wide[:12] if n % 3 == 0 else wide, rng.randint(3, 6))
        values = [rng.choice((1, 2, 39, 40, rng.randint(1, 40))) for _ in labels]
        made.append(make_chart(rng, tuple(labels), tuple(values), (KINDS[n % len(KINDS)],)))
    for n in range(count):
        labels, values = zip(*_marks(tables()[n * 4 % len(tables())], rng), strict=True)
        made.append(make_chart(rng, labels, values))
    return made


def test_all_kinds_occur():
    assert {chart.style.kind for chart in extreme_charts()} == set(KINDS)


def test_text_lies_inside_the_picture(monkeypatch):
    for chart in extreme_charts():
        _, boxes = printed_boxes(chart, monkeypatch)
        for left, top, right, bottom in boxes:
            assert left >= 0 and top >= 0 and right <= SIZE and bottom <= SIZE, chart


def test_texts_do_not_overlap(monkeypatch):
    for chart in extreme_charts():
        _, boxes = printed_boxes(chart, monkeypatch)
        for a, b in combinations(boxes, 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, (chart, a, b)


def test_every_label_and_value_is_visible(monkeypatch):
    """In each text's box stand pixels that are much darker than the paper."""
    for chart in extreme_charts(150):
        image, boxes = printed_boxes(chart, monkeypatch)
        labels = len(chart.labels)
        expected = labels * 2 if chart.style.printed or chart.style.kind == "table" else labels
        assert len(boxes) == expected + (0 if chart.style.kind == "table" else 3)
        for box in boxes:
            darkest, _ = image.crop(box).convert("L").getextrema()
            assert darkest < 190, (chart, box)


def test_no_two_words_look_alike():
    """Every label and number has its own glyphs at every size used."""
    words = [*vocabulary(), *map(str, range(LARGEST + 1))]
    for size in (9, 10):
        seen = {}
        for word in words:
            mask = charts._glyph(word, size)
            drawn = (mask.size, mask.tobytes())
            assert seen.setdefault(drawn, word) == word


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_values_look_different(kind):
    """Also where nothing is printed: reading off the axis must be possible."""
    rng = random.Random(kind)
    for labels in (("Jan", "Feb", "Mar"), ("Plymou", "Datsun", "Toyota", "Dodge", "Ford", "VW")):
        for value in range(1, LARGEST):
            values = [40, *(rng.randint(1, 40) for _ in labels[2:])]
            chart = make_chart(rng, labels, (*values, value), (kind,))
            other = Chart(labels, (*values, value + 1), chart.style)
            assert ImageChops.difference(draw(chart), draw(other)).getbbox() is not None


def test_bars_are_drawn_to_scale():
    """The filled column of an unprinted bar has the height its value says."""
    rng = random.Random(5)
    checked = 0
    while checked < 60:
        values = tuple(rng.randint(1, 40) for _ in range(4))
        chart = make_chart(rng, ("Q1", "Q2", "Q3", "Q4"), values, ("bar",))
        if chart.style.printed:
            continue
        checked += 1
        image, frame = draw(chart), charts._frame(chart)
        slot = (frame.right - frame.left) / 4
        for k, value in enumerate(values):
            x = round(frame.left + slot * (k + 0.5))
            filled = sum(
                image.getpixel((x, y)) == chart.style.inks[k] for y in range(frame.top - 2, SIZE)
            )
            measured = filled / (frame.bottom - frame.top) * chart.style.axis
            assert abs(measured - value) <= 0.5, (value, measured)


def test_axis_holds_every_value():
    for chart in extreme_charts(150):
        assert max(chart.values) <= chart.style.axis <= LARGEST


def test_same_seed_same_bytes():
    def bytes_of(seed: int) -> bytes:
        rng = random.Random(seed)
        return encode_png(draw(make_chart(rng, ("Jan", "Feb", "Mar"), (1, 20, 40))))

    assert bytes_of(1) == bytes_of(1)
    assert len({bytes_of(seed) for seed in range(20)}) == 20


def test_patches_follow_the_marks():
    """The dense loss of pretraining is told the mark under each patch's centre."""
    for chart in extreme_charts(60):
        grid = charts.mark_of_patch(chart, 16)
        assert len(grid) == 16 and all(len(row) == 16 for row in grid)
        found = {mark for row in grid for mark in row} - {-1}
        assert found == set(range(len(chart.labels))), chart
