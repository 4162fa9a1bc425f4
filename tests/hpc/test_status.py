from __future__ import annotations

import io
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import counting  # noqa: E402

from hpc.driver import Stopped  # noqa: E402
from hpc.errors import UserError  # noqa: E402
from hpc.progress import Bars  # noqa: E402
from hpc.retention import clean, size  # noqa: E402
from hpc.rundir import STOPPED, Chain, RunDir, write_json  # noqa: E402
from hpc.shards import ShardError, read_rows, shard_path, sidecar_path  # noqa: E402
from hpc.status import (  # noqa: E402
    Advance,
    JobCounts,
    advance,
    board,
    check_sizes,
    duration,
    status,
)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    run = tmp_path_factory.mktemp("complete")
    return counting.run(run, ["fail_every=10", "error_limit=0.1"])


@pytest.fixture
def chain(complete: Chain, tmp_path: Path) -> Chain:
    """A complete run of the test's own."""
    shutil.copytree(complete.run.path, tmp_path / "copy")
    return counting.open_chain(tmp_path / "copy")


def shown(value: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(value)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_complete_run(complete: Chain) -> None:
    found = status(complete)
    json.dumps(found)
    assert found["state"] == "complete" and found["reason"] == ""
    double = next(entry for entry in found["stages"] if entry["name"] == "double")
    assert double["state"] == "complete" and double["kind"] == "map"
    assert double["shards"] == {"done": 10, "total": 10}
    assert (double["inputs"]["done"], double["rows"], double["errors"]) == (40, 36, 4)
    assert double["seconds"] > 0 and double["rate"] == pytest.approx(40 / double["seconds"])
    text = shown(board(found))
    assert "double" in text and "complete" in text and "36" in text


def test_what_jobs_have_used(complete: Chain) -> None:
    double, first = {"node": 1.0, "core": 8.0, "gpu": 4.0}, {"node": 0.5, "core": 0.5, "gpu": 0.0}
    found = status(complete, {}, {"double": double, "preflight": first})
    assert found["hours"] == {"node": 1.5, "core": 8.5, "gpu": 4.0}
    entries = {entry["name"]: entry for entry in found["stages"]}
    assert entries["double"]["hours"] == double
    assert entries["double"]["per_gpu_hour"]["rows"] == pytest.approx(36 / 4)
    assert entries["double"]["per_gpu_hour"]["value"] == 2 * (780 - 60) / 4
    assert entries["total"]["hours"]["gpu"] == 0 and "per_gpu_hour" not in entries["total"]
    text = shown(board(found), 150)
    assert "GPU-h" in text and "core-hours: 8.5" in text and "360 value" in text


def test_a_stage_at_work_on_a_cluster(chain: Chain) -> None:
    chain.run.manifest("double").unlink()
    shard = shard_path(chain.run.shards("double"), 3)
    sidecar_path(shard).unlink()
    shard.unlink()
    held = JobCounts(pending=2, held=2, why="launch failed requeued held")
    found = status(chain, {"double": JobCounts(running=1, pending=1, why="Resources"), "x": held})
    double = next(entry for entry in found["stages"] if entry["name"] == "double")
    assert (double["state"], double["inputs"]) == ("running", {"done": 36, "total": 40})
    assert double["eta"] == pytest.approx(4 / 36 * double["seconds"])
    assert found["jobs"] == {"running": 1, "pending": 3, "held": 2, "why": held.why}
    assert found["state"] == "running" and "2 held (launch failed" in found["reason"]
    text = shown(board(found), 160)
    assert "1 run, 1 wait (Resources)" in text and " of " in text and "scontrol release" in text


def test_a_run_that_never_began(tmp_path: Path) -> None:
    found = status(counting.open_chain(tmp_path))
    assert found["state"] == "incomplete"
    assert {entry["state"] for entry in found["stages"]} == {"waiting"}
    assert "waiting" in shown(board(found))


def test_a_stopped_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        counting.run(tmp_path, ["fault=square:crash", "retries=0"])
    found = status(counting.open_chain(tmp_path))
    assert found["state"] == "stopped" and "out of luck" in found["reason"]
    states = {entry["name"]: entry["state"] for entry in found["stages"]}
    assert states["numbers"] == "complete" and states["square"] == "incomplete"
    assert states["total"] == "waiting"
    assert "out of luck" in shown(board(found), 200)


def test_reasons_are_no_markup(complete: Chain) -> None:
    found = status(complete) | {"reason": "[bold]not bold[/bold] [/]"}
    assert "[bold]not bold" in shown(board(found))


def test_a_stage_without_its_parent_is_outdated(chain: Chain) -> None:
    chain.run.manifest("double").unlink()
    found = status(chain)
    states = {entry["name"]: entry["state"] for entry in found["stages"]}
    assert states["double"] == "incomplete" and states["square"] == "complete"
    assert states["total"] == states["triple"] == "outdated"
    reasons = {entry["name"]: entry.get("reason") for entry in found["stages"]}
    assert reasons["total"] == "double is missing"
    assert "total is outdated: double is missing" in shown(board(found), 200)
    assert advance(chain, "double") == Advance(40, 40, 10, 10, 4, {})


def test_an_outdated_stage_says_why(chain: Chain) -> None:
    def reason(name: str) -> str | None:
        entries = {entry["name"]: entry for entry in status(chain)["stages"]}
        return entries[name].get("reason")

    shard = shard_path(chain.run.shards("square"), 3)
    shard.rename(shard.with_name("aside"))
    assert reason("square") == f"{shard.name} is missing"
    shard.with_name("aside").rename(shard)
    assert reason("square") is None
    chain.stages["square"] = replace(chain.stages["square"], config={"fail_every": 3})
    assert reason("square") == "configuration changed (fail_every: 10 → 3)"
    manifest = chain.run.read_manifest("numbers") or {}
    write_json(chain.run.manifest("numbers"), manifest | {"made": "anew"})
    assert reason("double") == "numbers was made again"


def test_a_cut_shard_is_named_without_reading_it(chain: Chain) -> None:
    check_sizes(chain)
    shard = shard_path(chain.run.shards("double"), 7)
    whole = shard.read_bytes()
    for cut in (b"", whole[:-1], whole + b"0"):
        shard.write_bytes(cut)
        with pytest.raises(ShardError, match=rf"{shard}: has {len(cut)} of {len(whole)} bytes"):
            check_sizes(chain)
    shard.write_bytes(whole)
    sidecar_path(shard).unlink()
    check_sizes(chain)  # not complete, which the board tells


def test_clean_deletes_what_can_be_missed(chain: Chain) -> None:
    part = chain.run.shards("double") / "00003.0.part"
    part.write_bytes(b"x" * 900)
    (part.parent / ".00003.json.0123456789ab.tmp").write_bytes(b"x" * 60)
    (chain.run.stage_dir("double") / ".manifest.json.0123456789ab.tmp").write_bytes(b"x" * 40)
    checkpoints = chain.run.stage_dir("total") / "checkpoints" / "step-1"
    checkpoints.mkdir(parents=True)
    (checkpoints / "weights").write_bytes(b"x" * 5000)
    listed = clean(chain)
    assert part.exists() and checkpoints.exists()
    found = Counter()
    for item in listed:
        found[item.stage, item.what] += item.bytes
    assert found["double", "parts"] == 1000 and found["total", "checkpoints"] == 5000
    assert not any(what in ("shards", "logs") for _, what in found)
    before = size(chain.run.path)
    assert clean(chain, plan=False) == listed
    assert before - size(chain.run.path) == sum(item.bytes for item in listed)
    assert status(chain)["state"] == "complete" and clean(chain) == []
    assert any(chain.run.logs("double").iterdir())
    clean(chain, plan=False, logs=True)
    assert not chain.run.logs("double").exists()
    assert len(list(read_rows(chain.run.shards("double")))) == 36
    jobs = chain.run.read_jobs()
    counting.run(chain.run.path)
    assert chain.run.read_jobs() == jobs  # nothing was made again
    clean(chain, plan=False, data=True)
    assert not chain.run.shards("double").exists()


def test_clean_keeps_what_an_unfinished_stage_resumes_from(chain: Chain) -> None:
    chain.run.manifest("double").unlink()
    part = chain.run.shards("double") / "00003.0.part"
    part.write_bytes(b"x")
    assert not any(item.stage == "double" for item in clean(chain, plan=False))
    assert part.exists()
    with chain.run.lock(), pytest.raises(UserError, match="at work"):
        clean(chain, plan=False)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (59.99, "60.0 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_bars(tmp_path: Path, terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    with Bars(console) as bars:
        words = ["pause=0.1", "fault=square:crash", "retries=1"]
        with pytest.raises(Stopped):
            counting.run(tmp_path, words, observer=bars)
    text = out.getvalue()
    assert "✓ numbers" in text and "40 rows" in text
    assert "↻ square" in text and "out of luck" in text and "✗ square" in text
    if terminal:
        assert "/40" in text  # a bar with its count
    else:
        assert "\x1b" not in text and "double: started" in text
    assert RunDir(tmp_path).marked(STOPPED)
