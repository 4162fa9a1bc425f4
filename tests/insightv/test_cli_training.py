"""``insightv train``: what it does not touch."""

import sys

import pytest

from hpc.errors import UserError
from hpc.locking import hold
from insightv import cli
from insightv.cli.training import _Alone


def enter(out):
    with _Alone(out).at_work():
        pass


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    enter(out)  # an empty folder is nothing to lose
    (out / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="precious is there already, and no training"):
        enter(out)
    # What this command began it may replace.
    (tmp_path / "precious.training" / "metrics.jsonl").touch()
    enter(out)


def test_two_trainings_do_not_share_an_output(tmp_path):
    out = tmp_path / "model"
    enter(out)
    with (
        hold(tmp_path / "model.training" / "lock"),
        pytest.raises(UserError, match="is at work there already"),
    ):
        enter(out)
    enter(out)


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_ranks_that_start_together_say_a_thing_once(rank, lines, tmp_path, monkeypatch, capsys):
    """And those of another node, where a folder may be missing, say it as well."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(sys, "argv", ["insightv", "train", "sft", str(tmp_path), "epochs=0"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("insightv: epochs is 0") == lines
