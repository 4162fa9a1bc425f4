"""Stages of another run: taken over when they are the same, and never otherwise."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import counting  # noqa: E402

from hpc import gates  # noqa: E402
from hpc.driver import drive  # noqa: E402
from hpc.errors import UserError  # noqa: E402
from hpc.executors.local import LocalExecutor  # noqa: E402
from hpc.reuse import reuse  # noqa: E402
from hpc.rundir import RunDir  # noqa: E402
from hpc.shards import read_rows, shard_path  # noqa: E402
from hpc.work import work  # noqa: E402

SMALL = ["n=8", "preload=false"]


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("donor") / "run"
    counting.run(path, SMALL)
    return path


@pytest.fixture
def copy(donor, tmp_path) -> Path:
    """A donor of one's own, to be spoiled."""
    return Path(shutil.copytree(donor, tmp_path / "copy"))


def take(run: Path, donors: list[Path], *settings: str, skip=()) -> dict[str, str]:
    """Stage to why it was not taken over; empty if it was."""
    chain = counting.open_chain(run, [*SMALL, *settings])
    return {found.stage: found.problem for found in reuse(chain, donors, skip)}


def fresh(run: Path) -> set[str]:
    return {name for name, whole in gates.standing(counting.open_chain(run)).items() if whole}


def test_equal_stages_are_taken_over_whole_and_nothing_runs_again(donor, tmp_path):
    run = tmp_path / "run"
    names = {"numbers", "double", "square", "total", "triple"}
    assert take(run, [donor]) == dict.fromkeys(names, "")
    assert fresh(run) == names
    for name in names:
        mine, theirs = RunDir(run).read_manifest(name), RunDir(donor).read_manifest(name)
        assert mine == {**theirs, "reused": str(donor)}
        assert list(read_rows(RunDir(run).shards(name))) == list(
            read_rows(RunDir(donor).shards(name))
        )
    shard = shard_path(RunDir(run).shards("double"), 0)
    assert shard.samefile(shard_path(RunDir(donor).shards("double"), 0))
    assert (run / "models" / "total" / "sum.txt").read_text() == "140"
    drive(counting.open_chain(run), LocalExecutor())
    assert not RunDir(run).jobs.exists()
    assert take(run, [donor]) == {}


def test_what_differs_and_what_depends_on_it_is_made_here(donor, tmp_path):
    run = tmp_path / "run"
    assert take(run, [donor], "factor=5") == {"numbers": "", "square": ""}
    counting.run(run, [])
    assert (run / "models" / "total" / "sum.txt").read_text() == str(8 * 28)
    # The donor's own stages are as they were.
    assert (donor / "models" / "total" / "sum.txt").read_text() == "140"
    assert fresh(donor) == {"numbers", "double", "square", "total", "triple"}


def test_the_same_hash_over_other_inputs_is_not_the_same_stage(donor, tmp_path):
    other = tmp_path / "other"
    counting.run(other, SMALL)  # the same settings, made for itself: other ids
    run = tmp_path / "run"
    assert take(run, [other], skip=("double", "square", "total", "triple")) == {"numbers": ""}
    # `double` has the same hash in both, but only in `other` was it made from these numbers.
    assert take(run, [donor]) == {}
    assert take(run, [donor, other])["double"] == ""
    assert RunDir(run).read_manifest("double")["reused"] == str(other)


def test_a_parent_made_again_there_shuts_out_its_dependents(copy, tmp_path):
    shutil.rmtree(RunDir(copy).stage_dir("numbers"))
    chain = counting.open_chain(copy)
    gates.prepare(chain, "numbers")
    # As a driver killed after its first stage leaves it.
    work(chain, "numbers")
    assert gates.check(chain, "numbers") == 0
    run = tmp_path / "run"
    assert take(run, [copy]) == {"numbers": ""}


@pytest.mark.parametrize("damage", ["flip", "shard", "sidecar", "model", "edited"])
def test_damaged_stages_are_named_and_not_taken(damage, copy, tmp_path):
    shard = shard_path(RunDir(copy).shards("double"), 0)
    model = copy / "models" / "total" / "sum.txt"
    stage = "total" if damage in ("model", "edited") else "double"
    if damage == "flip":
        stamp = shard.stat().st_mtime
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        os.utime(shard, (stamp, stamp))
    elif damage == "shard":
        shard.unlink()
    elif damage == "sidecar":
        shard.with_name("00000.json").unlink()
    elif damage == "model":
        shutil.rmtree(model.parent)
    else:
        model.write_text("7")
        later = RunDir(copy).read_manifest("total")["finished"] + 60
        os.utime(model, (later, later))
    run = tmp_path / "run"
    found = take(run, [copy])
    told = {"flip": "00000 is damaged", "edited": "was changed after"}.get(damage)
    assert (told or ("not those" if damage == "sidecar" else "is gone")) in found[stage]
    assert stage not in fresh(run) and not RunDir(run).stage_dir(stage).exists()
    assert not (run / "models" / "total").exists()
    assert not list((run / "stages").glob(".*"))


def test_unfinished_work_is_replaced_and_finished_work_kept(donor, tmp_path):
    run = tmp_path / "run"
    take(run, [donor], skip=("double", "square", "total", "triple"))
    chain = counting.open_chain(run)
    gates.prepare(chain, "double")
    (RunDir(run).shards("double") / "00000.0.part").write_text("half")
    before = RunDir(run).read_manifest("numbers")
    assert "double" in take(run, [donor])
    assert not list(RunDir(run).shards("double").glob("*.part"))
    assert RunDir(run).read_manifest("numbers") == before


def test_a_kill_before_the_last_rename_leaves_a_stage_to_be_made(donor, tmp_path, monkeypatch):
    run, rename = tmp_path / "run", Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target == RunDir(run).stage_dir("total"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        take(run, [donor])
    monkeypatch.undo()
    assert (run / "models" / "total").is_dir() and "total" not in fresh(run)
    counting.run(run, [])
    assert "reused" not in RunDir(run).read_manifest("total")
    assert (run / "models" / "total" / "sum.txt").read_text() == "140"


def test_without_hard_links_files_are_copied(donor, tmp_path, monkeypatch):
    def refuse(*words: object, **named: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run = tmp_path / "run"
    assert set(take(run, [donor]).values()) == {""}
    shard = shard_path(RunDir(run).shards("double"), 0)
    assert not shard.samefile(shard_path(RunDir(donor).shards("double"), 0))
    assert "double" in fresh(run)


def test_what_is_no_other_run_is_refused(donor, tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        take(tmp_path / "run", [tmp_path / "none"])
    with pytest.raises(UserError, match="is the run itself"):
        take(donor, [donor])
