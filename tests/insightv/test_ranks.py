"""What the processes of a training agree on: four of them, and one."""

from __future__ import annotations

import megatron_ranks
import pytest
from training_case import Here, family, store

from hpc.errors import UserError
from insightv.training.config import SFTConfig
from insightv.training.ranks import Ranks, joined
from insightv.training.trainer import train_sft


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for trouble in ("user", "crash"):
        megatron_ranks.spawn(megatron_ranks.agreeing, folder, trouble)
    return lambda trouble: [
        (folder / f"said-{trouble}-{rank}").read_text() for rank in range(megatron_ranks.WORLD)
    ]


def test_the_line_of_one_ends_all_and_is_said_once(said):
    assert said("user") == [
        "SystemExit 2",
        "SystemExit 2",
        "UserError the disk of rank 2 is full",
        "SystemExit 2",
    ]


def test_a_crash_ends_all_and_keeps_its_traceback(said):
    assert said("crash") == ["SystemExit 1", "SystemExit 1", "KeyError 7", "SystemExit 1"]


def test_alone_there_is_nobody_to_ask():
    ranks = Ranks()
    assert ranks.every(lambda: (1, 2)) == [(1, 2)] and ranks.lead and ranks.aside() is ranks
    with pytest.raises(KeyError):
        ranks.first(lambda: {}["x"])


def test_one_process_of_torch_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(SFTConfig()) as ranks:
        assert ranks.count == 1


def test_others_that_are_not_there_are_missed(monkeypatch, tmp_path):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "nowhere.invalid"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    pictures, ids = store(tmp_path / "pictures")
    with pytest.raises(UserError, match="2 processes .* do not find each other at nowhere"):
        train_sft(
            SFTConfig(device="cpu"), family("llava"), [], pictures, tmp_path, Here(tmp_path / "s")
        )
