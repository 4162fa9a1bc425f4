"""Question sets from real files in the schemas of public ones."""

import hashlib
import io
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from set_files import (
    TEXT,
    cauldron,
    chartqa,
    lines,
    llava,
    parquet,
    picture,
    scienceqa,
    stored,
    tar,
)

from hpc.errors import UserError
from insightv.pictures import Pictures, PictureWriter, decode
from insightv.questions import (
    Asked,
    Dropped,
    HeldOut,
    Place,
    SetConfig,
    SplitConfig,
    TurnsConfig,
    count_questions,
    load_set,
    read_questions,
)
from insightv.questions.duplicates import Fingerprint
from insightv.records import Question

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


class Sink:
    """Keeps pictures in memory under the ids a `PictureWriter` gives."""

    def __init__(self):
        self.kept = {}

    def add(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        self.kept[name] = data
        return name


def read(mapping, folder, split="train", **options):
    """Questions, what was dropped, and the pictures."""
    sink = Sink()
    found = list(read_questions(mapping, split, Place(folder), sink, **options))
    asked = [item.question for item in found if isinstance(item, Asked)]
    return asked, [item for item in found if isinstance(item, Dropped)], sink.kept


def jsonl_set(**fields) -> SetConfig:
    fields = {"splits": {"train": SplitConfig(files=["*.jsonl"])}} | fields
    return SetConfig(name="own", path="own", format="jsonl", **fields)


# ---- the mappings that come with the project


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_mapping_is_sound_and_says_where_its_columns_are_from(path):
    mapping = load_set(path)
    assert mapping.hub and mapping.path and mapping.splits
    assert (
        f"huggingface.co/datasets/{mapping.hub}" in path.read_text() or "d0rj" in path.read_text()
    )


def test_chartqa(tmp_path):
    same = picture(1)
    rows = [
        (same, "How many food items are shown?", ["14"], 0),
        (same, "Is the value of Lamb above 100?", ["Yes"], 1),
        (picture(2), "Which country is highest?", ["Norway"], 0),
        (picture(3), "Which years are above 5?", ["2011", "2012"], 0),
        (picture(4), "What share is red?", ["12.5%"], 1),
        (None, "What is missing?", ["a picture"], 0),
        (picture(5), "What is it worth?", [], 0),
    ]
    chartqa(tmp_path, "train", rows)
    asked, dropped, pictures = read(load_set(CONFIGS / "chartqa.yaml"), tmp_path)
    assert [(q.key, q.answer, q.answer_type, q.task) for q in asked] == [
        ("chartqa:train:0", "14", "number", "human"),
        ("chartqa:train:1", "yes", "yes_no", "machine"),
        ("chartqa:train:2", "Norway", "label", "human"),
        ("chartqa:train:3", "2011, 2012", "list", "human"),
        ("chartqa:train:4", "12.5%", "number", "machine"),
    ]
    assert asked[0].text == "How many food items are shown?"
    assert asked[0].pictures == asked[1].pictures and asked[0].group == asked[1].group
    assert pictures[asked[0].pictures[0]] == same and len(pictures) == 4
    assert [item.reason for item in dropped] == [
        "picture: none",
        "answer: none",
    ]
    assert not any(item.broken for item in dropped)


def test_ai2d_and_scienceqa_name_options_by_index(tmp_path):
    features = {
        "question": TEXT,
        "options": scienceqa_list(),
        "answer": TEXT,
        "image": image_feature(),
    }
    rows = [
        {
            "question": "What is X?",
            "options": ["leaf", "root", "stem", "seed"],
            "answer": "2",
            "image": stored(picture(1)),
        },
        {
            "question": "What is Y?",
            "options": ["leaf", "root"],
            "answer": "2",
            "image": stored(picture(2)),
        },
    ]
    parquet(tmp_path / "ai2d/data/test-00000-of-00002.parquet", features, rows)
    asked, dropped, _ = read(load_set(CONFIGS / "ai2d.yaml"), tmp_path, "test")
    (question,) = asked
    assert question.answer == "C" and question.options == ("leaf", "root", "stem", "seed")
    assert question.text == "What is X?\n(A) leaf\n(B) root\n(C) stem\n(D) seed"
    assert [(d.reason, d.broken) for d in dropped] == [
        ("answer: none of the options, or several", True)
    ]

    rows = [
        {
            "image": stored(picture(3)),
            "question": "Which is solid?",
            "choices": ["ice", "water"],
            "answer": 0,
            "hint": "Ice is frozen water.",
            "subject": "natural science",
        },
        {"image": None, "question": "Which is wet?", "choices": ["ice", "water"], "answer": 1},
    ]
    scienceqa(tmp_path, "train", rows)
    mapping = load_set(CONFIGS / "scienceqa.yaml")
    asked, dropped, _ = read(mapping, tmp_path)
    assert asked[0].text.startswith("Ice is frozen water.\nWhich is solid?\n(A) ice")
    assert asked[0].task == "natural science" and asked[0].answer == "A"
    assert [item.reason for item in dropped] == ["picture: none"]
    mapping.text_only = True
    asked, dropped, _ = read(mapping, tmp_path)
    assert len(asked) == 2 and not dropped and asked[1].pictures == ()


def test_mathvision_and_geometry3k(tmp_path):
    features = {
        "id": TEXT,
        "question": TEXT,
        "options": scienceqa_list(),
        "image": TEXT,
        "decoded_image": image_feature(),
        "answer": TEXT,
        "subject": TEXT,
    }
    row = {"image": "images/1.jpg", "decoded_image": stored(picture(1)), "subject": "algebra"}
    rows = [
        row | {"question": "Which is next? <image1>", "options": list("ABCDE"), "answer": "D"},
        row | {"question": "How long is it?\n<image1>", "options": [], "answer": "\\frac{3}{4}"},
    ]
    parquet(tmp_path / "MathVision/data/test-00000-of-00001-3532.parquet", features, rows)
    asked, dropped, _ = read(load_set(CONFIGS / "mathvision.yaml"), tmp_path, "test")
    assert not dropped
    assert [(q.answer, q.answer_type) for q in asked] == [
        ("D", "choice"),
        ("\\frac{3}{4}", "number"),
    ]
    assert "<image" not in asked[0].text + asked[1].text

    features = {"images": list_of_images(), "problem": TEXT, "answer": TEXT}
    rows = [
        {"images": [stored(picture(2))], "problem": "<image>Find x.", "answer": "6\\sqrt { 2 }"}
    ]
    parquet(tmp_path / "geometry3k/data/train-00000-of-00001.parquet", features, rows)
    (question,), _, _ = read(load_set(CONFIGS / "geometry3k.yaml"), tmp_path)
    assert (question.text, question.answer_type) == ("Find x.", "number")


def test_docvqa_and_textvqa_have_several_spellings_of_an_answer(tmp_path):
    features = {"question": TEXT, "image": image_feature(), "answers": scienceqa_list()}
    rows = [
        {"question": f"What is {n}?", "image": stored(picture(n)), "answers": ["ITC", "itc ltd"]}
        for n in range(60)
    ]
    parquet(tmp_path / "DocVQA/DocVQA/train-00000-of-00014.parquet", features, rows)
    mapping = load_set(CONFIGS / "docvqa.yaml")
    mapping.splits["train"].share, mapping.splits["validation"].share = 0.6, 0.4
    train, _, _ = read(mapping, tmp_path, "train")
    validation, _, _ = read(mapping, tmp_path, "validation")
    assert {q.text for q in train} | {q.text for q in validation} == {r["question"] for r in rows}
    assert len(train) + len(validation) == 60 and 20 < len(train) < 50
    assert train[0].answer == "ITC" and train[0].answer_type == "text"

    features |= {"image_id": TEXT}
    said = ["nokia", "Nokia", "nokia", "toshiba", "NOKIA", "no", "nokia", "nokia", "", "x"]
    rows = [
        {"question": "What brand?", "image": stored(picture(1)), "answers": said, "image_id": "a1"}
    ]
    parquet(tmp_path / "textvqa/data/validation-00000-of-00003.parquet", features, rows)
    (question,), _, _ = read(load_set(CONFIGS / "textvqa.yaml"), tmp_path, "test")
    assert (question.answer, question.group) == ("nokia", "textvqa/a1")


def test_conversations_become_questions_one_each(tmp_path):
    choices = "Question: What is {}?\nChoices:\nA. leaf\nB. root\nAnswer with the letter."
    rows = [
        ([picture(1)], [(choices.format("X"), "Answer: B"), (choices.format("Y"), "Answer: A")]),
        ([picture(2), picture(3)], [("Compare <image1> with <image2>.", "Answer: equal")]),
    ]
    cauldron(tmp_path, rows)
    mapping = load_set(CONFIGS / "the-cauldron.yaml")
    mapping.splits["train"].share = 1.0
    del mapping.splits["validation"]
    asked, dropped, _ = read(mapping, tmp_path)
    assert not dropped
    assert [q.key for q in asked] == [
        "cauldron-ai2d:train:0.0",
        "cauldron-ai2d:train:0.1",
        "cauldron-ai2d:train:1",
    ]
    assert asked[0].text == "What is X?\n(A) leaf\n(B) root"
    assert [q.answer for q in asked] == ["B", "A", "equal"]
    assert asked[2].text == "Compare (picture 1) with (picture 2)." and len(asked[2].pictures) == 2

    llava(
        tmp_path,
        [
            (
                picture(4),
                [
                    (
                        "human",
                        "<image>\nHow many?\nAnswer the question using a single word or phrase.",
                    ),
                    ("gpt", "12."),
                    ("human", "And red ones?"),
                    ("gpt", "3"),
                ],
            ),
            (picture(5), [("human", "<image>\nUnanswered?")]),
        ],
    )
    asked, dropped, _ = read(load_set(CONFIGS / "llava-onevision.yaml"), tmp_path)
    assert [(q.text, q.answer, q.answer_type) for q in asked] == [
        ("How many?", "12", "number"),
        ("And red ones?", "3", "number"),
    ]
    assert [(d.reason, d.broken) for d in dropped] == [
        ("row: conversations holds no question with an answer", True)
    ]


def test_mathv360k_names_its_pictures(tmp_path):
    folder = tmp_path / "MathV360K"
    (folder / "data_images/FigureQA").mkdir(parents=True)
    (folder / "data_images/FigureQA/1.png").write_bytes(picture(1))
    value = "<image>\nQuestion: Is red above blue?\nChoices:\n(A) yes\n(B) no"
    rows = [
        {
            "image": "FigureQA/1.png",
            "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "B"}],
        },
        {"image": "FigureQA/2.png", "conversations": rows_of("Which?", "7")},
        "no object",
    ]
    (folder / "train_samples_all_tuning.json").write_text(json.dumps(rows))
    mapping = load_set(CONFIGS / "mathv360k.yaml")
    mapping.splits["train"].share = 1.0
    del mapping.splits["validation"]
    (question,), dropped, pictures = read(mapping, tmp_path)
    assert question.text == "Is red above blue?\n(A) yes\n(B) no" and question.answer == "B"
    assert pictures[question.pictures[0]] == picture(1)
    assert [item.detail for item in dropped] == [
        "picture: the file 'FigureQA/2.png' is missing",
        "row: item 2 of train_samples_all_tuning.json is no object",
    ]


def rows_of(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def image_feature():
    from datasets import Image as Feature

    return Feature()


def list_of_images():
    from datasets import List

    return List(image_feature())


def scienceqa_list():
    from datasets import List

    return List(TEXT)


# ---- untrusted and broken


def test_names_of_files_never_lead_out_of_the_folder(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(picture(9))
    inside = tmp_path / "own/pictures"
    inside.mkdir(parents=True)
    (inside / "good.png").write_bytes(picture(1))
    (inside / "link.png").symlink_to(outside)
    (inside / "folder").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe.png")
    names = [
        "good.png",
        "../../secret.png",
        str(outside),
        "link.png",
        "folder/secret.png",
        "pipe.png",
        "a\0b.png",
        "x" * 5000,
        ".",
        7,
    ]
    rows = [{"question": f"{n}?", "answer": "1", "image": name} for n, name in enumerate(names)]
    lines(tmp_path / "own/rows.jsonl", rows)
    mapping = jsonl_set(picture_folder="pictures")
    asked, dropped, pictures = read(mapping, tmp_path)
    assert [q.key for q in asked] == ["own:train:0"]
    assert list(pictures.values()) == [picture(1)]
    assert len(dropped) == 9 and all(item.broken for item in dropped)
    assert (
        Counter(item.reason for item in dropped)[
            "picture: the file … leads out of the set's folder"
        ]
        == 2
    )
    assert all("\n" not in item.detail and len(item.detail) <= 500 for item in dropped)


def test_broken_enormous_and_odd_pictures_are_left_out_by_name(tmp_path):
    small = picture(1, (4, 4))
    bomb = io.BytesIO()
    Image.new("1", (9000, 8000)).save(bomb, "PNG")
    wide = picture(3, (6000, 30))
    photo = picture(4, (1200, 900), "JPEG", quality=90)
    palette = picture(5, (50, 50), "GIF")
    cut = picture(6)[:-40]
    rows = [b"", b"no picture", small, bomb.getvalue(), wide, photo, palette, cut]
    lines(tmp_path / "own/rows.jsonl", [])
    features = {"question": TEXT, "answer": TEXT, "image": image_feature()}
    made = [{"question": f"{n}?", "answer": "1", "image": stored(d)} for n, d in enumerate(rows)]
    parquet(tmp_path / "own/rows.parquet", features, made)
    mapping = SetConfig(name="own", path="own", splits={"train": SplitConfig(files=["*.parquet"])})
    mapping.longest_side = 1000
    asked, dropped, pictures = read(mapping, tmp_path)
    assert [q.key.rpartition(":")[2] for q in asked] == ["5", "6"]
    kept = decode(pictures[asked[0].pictures[0]], "kept")
    assert kept.size == (1000, 750)
    whole = decode(photo, "whole").resize(kept.size, Image.Resampling.LANCZOS)
    assert Fingerprint.of(kept, "a").resembles(Fingerprint.of(whole, "b"))
    assert pictures[asked[1].pictures[0]] == palette  # as it came
    assert all(item.broken for item in dropped) and len(dropped) == 6
    told = [item.detail for item in dropped]
    assert "empty" in told[0] and "4 x 4 pixels are too few" in told[2]
    assert "too narrow" in told[4] and "pixels, at most" in told[3]


def test_broken_rows_are_counted_and_do_not_stop_the_rest(tmp_path):
    good = {"question": "Which?", "answer": "1", "image": "a.png"}
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.png").write_bytes(picture(1))
    rows = [
        good,
        "{cut\n",
        "[1, 2]\n",
        "\n",
        good | {"question": ""},
        good | {"question": None},
        good | {"answer": None},
        good | {"options": 5},
        good | {"options": "['x', 'y']", "answer": "y"},
        "[" * 100_000 + "\n",
        good | {"question": "Last?", "answer": 3.0},
    ]
    lines(tmp_path / "own/rows.jsonl", rows)
    asked, dropped, _ = read(jsonl_set(options="options", splits=train()), tmp_path)
    assert [(q.key, q.answer) for q in asked] == [
        ("own:train:0", "1"),
        ("own:train:7", "B"),
        ("own:train:9", "3"),
    ]
    assert Counter(item.broken for item in dropped) == {True: 6, False: 1}


def test_values_that_are_no_text_are_no_answers(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.png").write_bytes(picture(1))
    given = [math.nan, 0.25, float(np.float32(0.1)), 2.5e20, True, {"value": "x"}, [["x"]], None]
    good = {"question": "How many?", "image": "a.png"}
    rows = [good | {"answer": value} for value in given]
    rows += [good | {"question": value, "answer": "1"} for value in (["a"], {"a": 1}, "<image>")]
    lines(tmp_path / "own/rows.jsonl", rows)
    asked, dropped, _ = read(jsonl_set(splits=train()), tmp_path)
    assert [(q.answer_type, q.answer) for q in asked] == [
        ("number", "0.25"),
        ("number", "0.1"),
        ("number", "2.5e+20"),
        ("yes_no", "yes"),
    ]
    assert [item.broken for item in dropped] == [False, True, True, False, True, True, True]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B. A dog", "B"),
        ("A dog", "B"),  # not the letter A
        ("A.B. Cat", "C"),
        ("A horse", ""),
        ("D", ""),
    ],
)
def test_letters_are_told_from_words(tmp_path, answer, expected):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.png").write_bytes(picture(1))
    options = {"A": "A cat", "B": "A dog", "C": "A.B. Cat", "D": None}  # columns for four
    row = {"question": "Which?", "image": "a.png", "answer": answer, "options": options}
    lines(tmp_path / "own/rows.jsonl", [row])
    mapping = jsonl_set(options="options", answer_is="letter", splits=train())
    asked, dropped, _ = read(mapping, tmp_path)
    assert [q.answer for q in asked] == ([expected] if expected else [])
    assert all(item.broken for item in dropped)
    assert not asked or asked[0].text.endswith("(C) A.B. Cat")


def train():
    return {"train": SplitConfig(files=["*.jsonl"])}


def test_damaged_files_stop_with_one_line_that_names_them(tmp_path):
    chartqa(tmp_path, "train", [(picture(n), f"{n}?", ["1"], 0) for n in range(40)])
    path = next(tmp_path.glob("ChartQA/data/*.parquet"))
    whole = path.read_bytes()
    mapping = load_set(CONFIGS / "chartqa.yaml")
    for damaged in (whole[:-100], b"", whole[:2000] + b"\xff" * 3000 + whole[5000:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged .*fetch it again"):
            read(mapping, tmp_path)
    samples = [{"png": picture(n), "json": b'{"question": "?", "answer": "1"}'} for n in range(9)]
    tar(tmp_path / "own/a.tar", samples)
    cut = (tmp_path / "own/a.tar").read_bytes()[:3000]
    (tmp_path / "own/a.tar").write_bytes(cut)
    with pytest.raises(UserError, match="damaged"):
        read(web(), tmp_path)


@pytest.mark.parametrize("data", [b"", b'[{"question": ', b'[{"question": "\xff"}]'])
def test_a_damaged_array_is_named(tmp_path, data):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.json").write_bytes(data)
    mapping = jsonl_set(splits={"train": SplitConfig(files=["*.json"])})
    mapping.format = "json"
    with pytest.raises(UserError, match=r"a.json is damaged .*fetch it again"):
        read(mapping, tmp_path)


@pytest.mark.parametrize("pattern", ["", "**.jsonl"])
def test_a_pattern_that_is_none_is_named(tmp_path, pattern):
    with pytest.raises(UserError, match="splits.train.files: .*pattern"):
        read(jsonl_set(splits={"train": SplitConfig(files=[pattern])}), tmp_path)


def web() -> SetConfig:
    return SetConfig(
        name="own",
        path="own",
        format="webdataset",
        splits={"train": SplitConfig(files=["*.tar"])},
        question="json.question",
        answer="json.answer",
        pictures=["png", "jpg"],
    )


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset(tmp_path, mode):
    samples = [
        {"png": picture(1), "json": b'{"question": "How many?", "answer": 4}'},
        {"json": b'{"question": "Which?", "answer": "b"}', "jpg": picture(2, form="JPEG")},
        {"json": b"{", "jpg": picture(3, form="JPEG")},
        {"json": b'{"question": "Where?", "answer": "here"}'},
    ]
    tar(tmp_path / "own/a.tar", samples, mode)
    asked, dropped, pictures = read(web(), tmp_path)
    assert [(q.text, q.answer) for q in asked] == [("How many?", "4"), ("Which?", "b")]
    assert [item.detail for item in dropped] == [
        "row: 000002.json in a.tar is no JSON",
        "picture: none",
    ]
    assert count_questions(web(), "train", Place(tmp_path)) == 4 and len(pictures) == 2


def test_easy_vqa_as_a_web_dataset(tmp_path):
    from insightv.demo.shapes import easy_vqa_rows

    rows = list(easy_vqa_rows("test"))[:300]
    samples = [
        {"png": path.read_bytes(), "json": json.dumps({"question": q, "answer": a}).encode()}
        for q, a, path in rows
    ]
    tar(tmp_path / "own/0.tar", samples[:150])
    tar(tmp_path / "own/1.tar", samples[150:])
    asked, dropped, pictures = read(web(), tmp_path)
    assert not dropped and [(q.text, q.answer) for q in asked] == [(q, a) for q, a, _ in rows]
    assert {q.answer_type for q in asked} == {"yes_no", "text"}
    assert set(pictures.values()) == {path.read_bytes() for _, _, path in rows}


# ---- the hub


def test_the_hub_is_read_only_where_it_may_be_and_at_a_commit(tmp_path, monkeypatch):
    """`datasets` streams a repository's folder just as it streams the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    chartqa(tmp_path, "train", [(picture(n), f"{n}?", [str(n)], n % 2) for n in range(5)])
    mapping = load_set(CONFIGS / "chartqa.yaml", [f"hub={tmp_path}/ChartQA", "path=elsewhere"])
    with pytest.raises(UserError, match="questions.network=true"):
        read(mapping, tmp_path)
    open_place = Place(tmp_path, network=True)
    found = list(read_questions(mapping, "train", open_place, Sink(), size=4))
    assert [item.question.answer for item in found] == ["0", "1", "2", "3"]
    assert [item.question.task for item in found] == ["human", "machine"] * 2
    mapping.revision = ""
    with pytest.raises(UserError, match="give revision"):
        list(read_questions(mapping, "train", open_place, Sink()))
    mapping.revision, mapping.hub = "x", f"{tmp_path}/nothing"
    with pytest.raises(UserError, match="the hub does not give"):
        list(read_questions(mapping, "train", open_place, Sink()))


def test_a_hub_that_breaks_off_is_told_in_one_line(tmp_path, monkeypatch):
    def stream(*_, **__):
        class Rows:
            def decode(self, _):
                yield {"query": "?", "label": ["1"], "image": picture(1), "human_or_machine": 0}
                raise ConnectionError("reset by peer")

        return Rows()

    monkeypatch.setattr("datasets.load_dataset", stream)
    mapping = load_set(CONFIGS / "chartqa.yaml")
    found = read_questions(mapping, "train", Place(tmp_path, network=True), Sink())
    assert isinstance(next(found), Asked)
    with pytest.raises(UserError, match=r"does not give .*ConnectionError: reset by peer"):
        list(found)


# ---- what users get wrong


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nam: x", "did you mean name"),
        ("turns: {colum: x}", "did you mean turns.column"),
        ("splits: {train: {file: [a]}}", "did you mean splits.train.files"),
        ("splits: {dev: {files: [a]}}", "no split 'dev'; use train"),
        ("splits: {train: {files: [../a]}}", "without .."),
        ("splits: {train: {files: [/etc/passwd]}}", "without .."),
        ("picture_folder: ..", "without .."),
        ("format: csv", "use parquet, jsonl"),
        ("answer_type: float", "use auto, number"),
        ("name: charts", "none of charts"),
        ("name: a:b", "letters, digits"),
        ("pictures: []", "text_only"),
        (
            "splits: {train: {files: [a], share: 0.9}, test: {files: [a], share: 0.2}}",
            "more than 1",
        ),
        ("turns: {column: c, role: from}", "either question and answer"),
        ("turns: {column: c, role: from, text: value, most: -1}", "turns.most is -1"),
        ("splits: {}", "has no splits"),
    ],
)
def test_mistakes_in_a_mapping_are_named(tmp_path, text, told):
    path = tmp_path / "set.yaml"
    lead = "" if text.startswith("name") else "name: own\n"
    rest = "" if text.startswith("splits") else "splits: {train: {files: [a]}}\n"
    path.write_text(f"{lead}{rest}{text}\n")
    with pytest.raises(UserError) as error:
        load_set(path)
    assert told in str(error.value) and "set.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_column_names_the_nearest(tmp_path):
    chartqa(tmp_path, "train", [(picture(1), "How many?", ["1"], 0)])
    mapping = load_set(CONFIGS / "chartqa.yaml", ["question=querry"])
    with pytest.raises(UserError, match=r"no column querry; did you mean query\?"):
        read(mapping, tmp_path)
    (tmp_path / "own").mkdir()
    lines(tmp_path / "own/a.jsonl", [{"question": "?", "anser": "1", "image": "a.png"}])
    with pytest.raises(UserError, match=r"no column answer; did you mean anser\?"):
        read(jsonl_set(), tmp_path)


def test_a_column_that_no_row_has_is_told(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.png").write_bytes(picture(1))
    lines(tmp_path / "own/a.jsonl", [{"question": "?", "answer": "1", "image": "a.png"}])
    with pytest.raises(UserError, match=r"no row has a column choices"):
        read(jsonl_set(options="choices"), tmp_path)


def test_missing_files_say_how_to_fetch_them(tmp_path):
    with pytest.raises(UserError, match=r"hf download --repo-type dataset HuggingFaceM4/ChartQA"):
        read(load_set(CONFIGS / "chartqa.yaml"), tmp_path)
    with pytest.raises(UserError, match="mend path or files"):
        read(jsonl_set(), tmp_path)


# ---- how many, and which


def test_a_draw_takes_what_is_asked_for_from_all_over_and_makes_up_for_what_is_dropped(tmp_path):
    rows = [(picture(n) if n % 5 else None, f"{n}?", ["1"], 0) for n in range(300)]
    chartqa(tmp_path, "train", rows)
    mapping = load_set(CONFIGS / "chartqa.yaml")
    asked, dropped, _ = read(mapping, tmp_path, size=60, seed=1)
    assert len(asked) == 60 and 3 < len(dropped) < 40
    places = [int(q.key.rpartition(":")[2]) for q in asked]
    assert min(places) < 40 and max(places) > 260 and places == sorted(places)
    again, _, _ = read(mapping, tmp_path, size=60, seed=1)
    other, _, _ = read(mapping, tmp_path, size=60, seed=2)
    assert [q.key for q in again] == [q.key for q in asked] != [q.key for q in other]
    everything, _, _ = read(mapping, tmp_path, size=10_000)
    assert len(everything) == 240


def test_a_draw_from_conversations_gives_no_more_than_asked(tmp_path):
    turns = [(f"Question {n}?", "Answer: 1") for n in range(4)]
    cauldron(tmp_path, [([picture(n)], turns) for n in range(50)])
    mapping = load_set(CONFIGS / "the-cauldron.yaml")
    asked, _, _ = read(mapping, tmp_path, size=50)
    assert len(asked) == 50
    rows = [int(q.key.split(":")[2].split(".")[0]) for q in asked]
    assert max(rows) > 30
    mapping.turns = TurnsConfig(column="texts", question="user", answer="assistant", most=1)
    asked, _, _ = read(mapping, tmp_path)
    assert len(asked) <= 50 and all("." not in q.key for q in asked)


def test_splits_that_share_rows_never_share_a_picture(tmp_path):
    rows = [(picture(n % 40), f"{n}?", ["1"], 0) for n in range(120)]
    chartqa(tmp_path, "train", rows)
    mapping = load_set(CONFIGS / "chartqa.yaml")
    files = ["data/train-*.parquet"]
    mapping.splits = {
        "train": SplitConfig(files=files, share=0.5),
        "validation": SplitConfig(files=files, share=0.2),
        "test": SplitConfig(files=files, share=0.3),
    }
    mapping.validate("here")
    seen = {}
    for split in mapping.splits:
        asked, _, _ = read(mapping, tmp_path, split)
        for question in asked:
            assert seen.setdefault(question.pictures[0], split) == split
    assert len(seen) == 40 and set(seen.values()) == set(mapping.splits)


def test_pictures_go_into_packs_once(tmp_path):
    chartqa(tmp_path, "train", [(picture(n % 3), f"{n}?", ["1"], 0) for n in range(9)])
    with PictureWriter(tmp_path / "pictures") as writer:
        mapping = load_set(CONFIGS / "chartqa.yaml")
        found = list(read_questions(mapping, "train", Place(tmp_path), writer))
    packs = Pictures([tmp_path / "pictures"])
    assert len(list(packs)) == 3
    for item in found:
        assert packs.image(item.question.pictures[0]).size == (64, 48)


# ---- duplicates


def marks(data: bytes) -> Fingerprint:
    return Fingerprint.of(decode(data, "x"), hashlib.sha256(data).hexdigest())


def test_a_picture_is_known_again_in_another_encoding_or_size_and_others_are_not():
    known = marks(picture(7, (640, 480)))
    assert known.resembles(marks(picture(7, (640, 480), "JPEG", quality=60)))
    assert known.resembles(marks(picture(7, (320, 240), "WEBP", quality=80)))
    assert not any(known.resembles(marks(picture(n, (640, 480)))) for n in range(40) if n != 7)


def test_held_out_questions_are_found_by_text_and_picture():
    held = HeldOut()
    held.add("chartqa:test:3", "How many bars?", [marks(picture(1, (640, 480)))])
    again = [marks(picture(1, (640, 480), "JPEG", quality=80))]
    assert held.same_question("how many  bars", again) == "chartqa:test:3"
    assert not held.same_question("How many lines?", again)
    assert not held.same_question("How many bars?", [marks(picture(2))])
    assert not held.same_question("How many bars?", [*again, marks(picture(2))])
    same = marks(picture(1, (640, 480)))
    assert held.same_picture([marks(picture(2)), same]) == "chartqa:test:3"
    assert not held.same_picture([marks(picture(2))])
    assert len(held) == 1


def test_a_question_is_known_again_however_another_set_words_its_demand_and_options(tmp_path):
    """The Cauldron's AI2D against the evaluations': the pair that own-data.yaml names."""
    features = {"question": TEXT, "options": scienceqa_list(), "answer": TEXT}
    row = {"question": "Which eats grass?", "options": ["hawk", "rabbit"], "answer": "1"}
    row["image"] = stored(picture(1, (640, 480)))
    path = tmp_path / "ai2d/data/test-00000-of-00001.parquet"
    parquet(path, features | {"image": image_feature()}, [row])
    held = HeldOut()
    sets = Place(tmp_path)
    for found in read_questions(load_set(CONFIGS / "ai2d.yaml"), "test", sets, Sink()):
        held.add(found.question.key, found.text, found.pictures)
    wording = "Question: {}\nChoices:\nA. hawk\nB. rabbit\nAnswer with the letter."
    turns = [(wording.format(text), "Answer: B") for text in ("Which eats grass?", "Which flies?")]
    cauldron(tmp_path, [([picture(1, (640, 480), "JPEG")], turns)])
    mapping = load_set(CONFIGS / "the-cauldron.yaml")
    mapping.splits = {"train": SplitConfig(files=mapping.splits["train"].files)}
    found = list(read_questions(mapping, "train", sets, Sink()))
    told = [held.same_question(item.text, item.pictures) for item in found]
    assert told == ["ai2d:test:0", ""]


# ---- whatever rows hold

ODD = ["a.png", "A", "['x', 'y']", "<image1>", "A. x\nB. y", "1/2", "..", "\x1b", "\ud800"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["bytes", "path", "from", "value", "q"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"question": VALUES, "answer": VALUES, "image": VALUES, "options": VALUES}
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["text", "letter", "index", "index_from_one"]),
    st.sampled_from(["first", "commonest", "list"]),
    st.sampled_from(["auto", "choice", "yes_no", "list", "text"]),
    st.booleans(),
)
def test_no_row_does_more_than_fail(tmp_path, rows, answer_is, several, answer_type, turns):
    (tmp_path / "own").mkdir(exist_ok=True)
    (tmp_path / "own/a.png").write_bytes(picture(1))
    lines(tmp_path / "own/rows.jsonl", rows)
    mapping = jsonl_set(
        answer_is=answer_is,
        several=several,
        answer_type=answer_type,
        options="" if turns else "options",
        options_in_question=True,
        text_only=True,
        turns=TurnsConfig("question", role="from", text="value") if turns else TurnsConfig(),
    )
    asked, dropped, kept = read(mapping, tmp_path)
    assert len(asked) + len(dropped) >= len(rows)
    for question in asked:
        assert question.text and question.answer and set(question.pictures) <= set(kept)
        json.dumps(question.to_json(), ensure_ascii=False).encode()
        assert Question.from_json(json.loads(json.dumps(question.to_json()))) == question
        if question.answer_type == "choice":
            assert ord(question.answer) - ord("A") in range(len(question.options))
    assert all(item.reason and len(item.detail) <= 500 for item in dropped)
