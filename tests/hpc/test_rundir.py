from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.errors import UserError
from hpc.provenance import describe
from hpc.rundir import CANCELLED, STOPPED, Chain, RunDir, read_json, write_json
from hpc.stages import Stage


def job(name: str, after: tuple[str, ...] = (), **more: object) -> Stage:
    return Stage(name, "job", after=after, run=lambda context: None, **more)  # type: ignore[arg-type]


def test_chain_is_put_in_order(tmp_path: Path) -> None:
    chain = Chain([job("c", ("b",)), job("a"), job("b", ("a",))], tmp_path, ["program"])
    assert list(chain.stages) == ["a", "b", "c"]
    assert chain.dependents("a") == ["b", "c"] and chain.dependents("c") == []


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([job("a"), job("a")], "a: named twice"),
        ([job("a", ("b",))], "a: needs b"),
        ([job("a", ("b",)), job("b", ("a",))], "wait for each other"),
        ([job("../a")], "letters, digits and dashes"),
        ([job("")], "letters, digits and dashes"),
        ([Stage("a", "job")], "a: a job needs"),
        ([Stage("a", "map", load=lambda context: None)], "a: a map needs"),  # type: ignore
        ([job("a", outputs=("../../etc",))], "leaves the run directory"),
        ([job("a", outputs=("/etc",))], "leaves the run directory"),
    ],
)
def test_chain_refuses(tmp_path: Path, stages: list[Stage], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Chain(stages, tmp_path, ["program"])


def test_identity_is_of_what_shapes_results(tmp_path: Path) -> None:
    def identity(**more: object) -> str:
        return Chain([job("a", **more)], tmp_path, ["program"]).identity("a")

    plain = identity(config={"n": 1})
    assert identity(config={"n": 1}, workers=9, error_limit=0.5, resources="gpu") == plain
    assert identity(config={"n": 2}) != plain


def test_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run"):
        RunDir(tmp_path / "file" / "run").create()
    with pytest.raises(UserError, match="/proc/run"):
        RunDir("/proc/run").create()


def test_markers(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.marked(STOPPED) is None
    run.mark(STOPPED, "too bad")
    run.mark(CANCELLED)
    assert run.marked(STOPPED) == "too bad" and run.marked(CANCELLED) == ""
    run.unmark(STOPPED, CANCELLED)
    assert run.marked(STOPPED) is None and run.marked(CANCELLED) is None


def test_jobs_survive_a_cut_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.add_job(stage="a", process=1)
    with run.jobs.open("a") as file:
        file.write('{"stage": "b", "pro')
    assert [entry["stage"] for entry in run.read_jobs()] == ["a"]


def test_a_broken_json_file_is_named(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    write_json(tmp_path / "new" / "a.json", {"é": 1})
    assert read_json(tmp_path / "new" / "a.json") == {"é": 1}
    for text in ("{", "5", "[]", ""):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UserError, match="b.json.*delete it"):
            read_json(tmp_path / "b.json")


def test_provenance_tells_code_and_hides_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", "server.api_key=abc123", "max_tokens=5"])
    monkeypatch.setenv("SOME_TOKEN", "abc123")
    monkeypatch.setenv("APPTAINER_CONTAINER", str(tmp_path / "image.sif"))
    (tmp_path / "image.sif").write_bytes(b"image")
    entry = describe(("hpc",))
    assert "abc123" not in json.dumps(entry) and "max_tokens=5" in entry["command"]
    assert len(entry["code"]["hpc"]["sources"]) == 16
    assert entry["image"]["sha256"].startswith("6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51")
    assert "omegaconf" in {name.lower() for name in entry["packages"]}
    run = RunDir(tmp_path / "run")
    run.create()
    run.add_provenance()
    run.add_provenance()
    assert len(read_json(run.provenance)["starts"]) == 1


def test_lock_keeps_a_second_driver_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert not run.locked()
    with run.lock():
        assert run.locked()
        with pytest.raises(UserError, match=f"process {os.getpid()}"), RunDir(tmp_path).lock():
            pass
    assert not run.locked()
    with run.lock():
        pass


def test_lock_waits_for_the_workers_of_a_dead_driver(tmp_path: Path) -> None:
    """The driver dies; its worker, which inherited the lock, leaves a second later."""
    code = (
        "import os, subprocess, sys\n"
        "from hpc.rundir import RunDir\n"
        f"with RunDir({str(tmp_path)!r}).lock() as held:\n"
        "    subprocess.Popen(['sleep', sys.argv[1]], pass_fds=[held])\n"
        "    os._exit(9)\n"
    )
    run = RunDir(tmp_path)
    subprocess.run([sys.executable, "-c", code, "1.5"], check=False, timeout=60)
    begun = time.monotonic()
    with run.lock():
        assert time.monotonic() - begun > 0.3
    worker = subprocess.run([sys.executable, "-c", code, "5"], check=False, timeout=60)
    assert worker.returncode == 9
    with pytest.raises(UserError, match="earlier run are still at work"), run.lock(patience=0.2):
        pass


def test_remove_takes_outputs_and_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for path in (run.shards("a") / "00000.json", run.models / "m" / "w.safetensors"):
        path.parent.mkdir(parents=True)
        path.touch()
    run.remove("a", ("models/m",))
    assert not run.stage_dir("a").exists() and not (run.models / "m").exists()
    assert list((run.path / "stages").iterdir()) == []
