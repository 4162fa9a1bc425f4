"""``insightv train``: what it does not touch."""

import pytest

from hpc.errors import UserError
from hpc.locking import hold
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
