"""`insightv questions`: how a set reads."""

import sys
from pathlib import Path

import pytest
from set_files import chartqa, picture

from insightv import cli

CHARTQA = Path(__file__).parents[2] / "configs" / "data" / "chartqa.yaml"


@pytest.fixture
def show(monkeypatch, capsys, tmp_path):
    rows = [(picture(n), f"How many are {n}?", [str(n)], 0) for n in range(8)]
    rows += [(None, "Without?", ["1"], 0), (b"broken", "Broken?", ["1"], 0)]
    rows[1] = (picture(1), "Is it \x1b[31mred\x9b?", ["Yes"], 1)
    chartqa(tmp_path, "train", rows)

    def call(*words: object) -> tuple[int, str, str]:
        given = ["insightv", "questions", CHARTQA, "--folder", tmp_path, *words]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


def test_questions_and_what_is_left_out(show):
    status, out, _ = show()
    assert status == 0
    assert "chartqa:train:0  How many are 0?\n  number: 0\n" in out
    assert "chartqa, train: 8 questions of some 10 rows; number 7, yes_no 1" in out
    assert "pictures of a question: 1 8" in out
    assert "1 left out: picture: none" in out and "1 broken: picture … cannot be decoded" in out
    assert "\x1b" not in out and "\x9b" not in out


def test_keys_are_overridden_and_mistakes_told(show):
    assert "train: 3 questions" in show("otherwise=text", "--most", 3)[1]
    status, _, err = show("--split", "dev")
    assert status == 2 and "it has train, validation, test" in err
    status, _, err = show("quesiton=query")
    assert status == 2 and "did you mean question" in err


def test_a_columns_name_cannot_steer_the_terminal(show, tmp_path):
    (tmp_path / "ChartQA/rows.jsonl").write_text('{"quer\\u001b[2Jy": "?", "label": "1"}\n')
    status, _, err = show("format=jsonl", "splits.train.files=[rows.jsonl]")
    assert status == 2 and "did you mean quer\ufffd[2Jy?" in err
