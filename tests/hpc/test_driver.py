"""Chains of real processes, and what becomes of them when things are killed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import counting  # noqa: E402

from hpc.driver import Quiet, Stopped, drive  # noqa: E402
from hpc.errors import UserError  # noqa: E402
from hpc.executors.local import LocalExecutor  # noqa: E402
from hpc.rundir import CANCELLED, STOPPED, RunDir  # noqa: E402
from hpc.shards import read_groups, shard_path, sidecars  # noqa: E402
from hpc.stages import Stage  # noqa: E402
from hpc.status import status  # noqa: E402

N = 40
FAST = ["retries=1"]


class Heard(Quiet):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def kept(self, stage: Stage) -> None:
        self.events.append(("kept", stage.name))

    def started(self, stage: Stage, attempt: int, workers: int) -> None:
        self.events.append(("started", stage.name))

    def retried(self, stage: Stage, reason: str) -> None:
        self.events.append(("retried", stage.name))

    def finished(self, stage: Stage, manifest: Any) -> None:
        self.events.append(("finished", stage.name))


def keys(run: Path, stage: str) -> Counter[str]:
    folder = RunDir(run).shards(stage)
    found: Counter[str] = Counter()
    for index in sidecars(folder):
        found.update(key for key, _ in read_groups(shard_path(folder, index)))
    return found


def check_complete(run: Path, n: int = N) -> None:
    expected = Counter(f"n:{i}" for i in range(n))
    for stage in ("numbers", "double", "square", "triple"):
        assert keys(run, stage) == expected, stage
    total = (run / "models" / "total" / "sum.txt").read_text()
    assert int(total) == 5 * sum(range(n))
    assert status(counting.open_chain(run))["state"] == "complete"


def made(run: Path) -> dict[str, str]:
    rundir = RunDir(run)
    return {
        name: (rundir.read_manifest(name) or {})["made"]
        for name in ("numbers", "double", "square", "total", "triple")
    }


def processes_of(run: Path) -> list[psutil.Process]:
    """Every process that names the run directory in its command line, or works for it."""
    found = []
    for entry in RunDir(run).read_jobs():
        try:
            process = psutil.Process(entry["process"])
            if process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= entry["time"]:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def wait_for(good: Callable[[], bool], seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def program(run: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, counting.__file__, "run", str(run), *words]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    counting.run(run)
    return run


@pytest.fixture
def finished_run(finished: Path, tmp_path: Path) -> Path:
    """A complete run of the test's own."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize("preload", ["true", "false"])
def test_a_chain_runs_and_the_second_run_does_nothing(tmp_path: Path, preload: str) -> None:
    heard = Heard()
    counting.run(tmp_path, [f"preload={preload}"], observer=heard)
    check_complete(tmp_path)
    finished = [name for event, name in heard.events if event == "finished"]
    assert sorted(finished) == ["double", "numbers", "square", "total", "triple"]
    assert finished[0] == "numbers" and finished.index("total") > finished.index("double")
    before, jobs = made(tmp_path), RunDir(tmp_path).read_jobs()
    again = Heard()
    begun = time.monotonic()
    counting.run(tmp_path, observer=again)
    assert time.monotonic() - begun < 5
    assert {event for event, _ in again.events} == {"kept"}
    assert made(tmp_path) == before and RunDir(tmp_path).read_jobs() == jobs
    assert not processes_of(tmp_path)
    starts = json.loads(RunDir(tmp_path).provenance.read_text())["starts"]
    assert len(starts) == 1 and "hpc" in starts[0]["code"]


def test_workers_killed_at_random_moments(tmp_path: Path) -> None:
    done, rng, killed = threading.Event(), random.Random(0), []

    def kill_some() -> None:
        while not done.wait(rng.uniform(0.2, 0.8)) and len(killed) < 12:
            if alive := processes_of(tmp_path):
                victim = rng.choice(alive)
                victim.kill()
                killed.append(victim.pid)

    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        counting.run(tmp_path, ["pause=0.05", "retries=30"])
    finally:
        done.set()
        killer.join()
    assert killed
    check_complete(tmp_path)


def test_driver_killed_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(1)
    words = ["pause=0.03"]
    for _ in range(6):
        process = program(tmp_path, *words)
        try:
            process.wait(timeout=rng.uniform(1.0, 5.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    counting.run(tmp_path)
    check_complete(tmp_path)
    wait_for(lambda: not processes_of(tmp_path))


def test_removing_a_stage_remakes_it_and_what_depends_on_it(finished_run: Path) -> None:
    before = made(finished_run)
    shutil.rmtree(RunDir(finished_run).stage_dir("double"))
    heard = Heard()
    counting.run(finished_run, observer=heard)
    after = made(finished_run)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"double", "total", "triple"}
    assert ("kept", "square") in heard.events
    check_complete(finished_run)
    shutil.rmtree(finished_run / "models" / "total")  # an output counts as much as the folder
    counting.run(finished_run)
    assert {name for name in after if after[name] != made(finished_run)[name]} == {
        "total",
        "triple",
    }


def test_changed_configuration_is_refused_by_name_and_unhashed_change_is_not(
    finished_run: Path,
) -> None:
    before = made(finished_run)
    counting.run(finished_run, ["workers=1", "pause=0.5", "slots=1"])
    assert made(finished_run) == before
    with pytest.raises(UserError, match=r"stage double .*factor: 2 → 5.*--remake"):
        counting.run(finished_run, ["factor=5"])
    assert made(finished_run) == before
    counting.run(finished_run, ["pause=0", "slots=2"], remake=True)
    after = made(finished_run)
    assert {name for name in before if before[name] != after[name]} == {"double", "total", "triple"}
    total = (finished_run / "models" / "total" / "sum.txt").read_text()
    assert int(total) == 8 * sum(range(N))


def test_the_limit_on_errors(tmp_path: Path) -> None:
    words = ["fail_every=4"]
    with pytest.raises(Stopped, match=r"1?\d of 40 inputs failed.*× even numbers are not liked"):
        counting.run(tmp_path, [*words, "error_limit=0.1"])
    assert status(counting.open_chain(tmp_path))["state"] == "stopped"
    counting.run(tmp_path, ["error_limit=0.25"])
    manifest = RunDir(tmp_path).read_manifest("double")
    assert manifest and (manifest["errors"], manifest["rows"]) == (10, 30)
    assert RunDir(tmp_path).marked(STOPPED) is None


@pytest.mark.parametrize("kind", ["crash", "exit"])
def test_a_payload_that_always_dies_stops_the_chain(tmp_path: Path, kind: str) -> None:
    heard = Heard()
    said = "out of luck" if kind == "crash" else "exit status 7"
    with pytest.raises(Stopped, match=said) as caught:
        counting.run(tmp_path, [f"fault=double:{kind}", *FAST], observer=heard)
    assert "stage double" in str(caught.value) and "log: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert heard.events.count(("retried", "double")) == 1
    assert not processes_of(tmp_path)
    assert "stage double" in (RunDir(tmp_path).marked(STOPPED) or "")


def test_a_program_that_dies_at_import_stops_the_chain(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_here\n")
    chain = counting.open_chain(tmp_path / "run")
    chain.command = [sys.executable, str(broken)]
    for preload in ([], ["hpc.config"]):
        with pytest.raises(Stopped, match=r"No module named 'no_such_module_here'.*2 attempts"):
            drive(chain, LocalExecutor(preload=preload), retries=1)
    assert not processes_of(tmp_path / "run")


def test_a_users_error_is_one_line_and_final(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(Stopped, match="/nowhere is not a model folder; give another$") as caught:
        counting.run(tmp_path, ["fault=double:user"], observer=heard)
    assert "\n" not in str(caught.value)
    assert ("retried", "double") not in heard.events
    assert not processes_of(tmp_path)
    counting.run(tmp_path, ["fault=''"])  # mended: goes on
    check_complete(tmp_path)


def test_a_payload_may_ask_to_be_requeued(tmp_path: Path) -> None:
    heard = Heard()
    counting.run(tmp_path, ["fault=total:requeue", "retries=0"], observer=heard)
    assert heard.events.count(("started", "total")) == 2
    check_complete(tmp_path)


def test_two_drivers_on_one_run(tmp_path: Path) -> None:
    first = program(tmp_path, "pause=0.2")
    try:
        wait_for(lambda: bool(processes_of(tmp_path)))
        with pytest.raises(UserError, match=f"process {first.pid} on .* is at work there"):
            counting.run(tmp_path)
        assert status(counting.open_chain(tmp_path))["state"] == "running"
    finally:
        first.terminate()
        first.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_workers_leave(tmp_path: Path, number: int) -> None:
    process = program(tmp_path, "pause=0.3")
    wait_for(lambda: any(e["stage"] == "double" for e in RunDir(tmp_path).read_jobs()))
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(timeout=60) in (-number, 128 + number, 130)
    assert not processes_of(tmp_path)
    assert status(counting.open_chain(tmp_path))["state"] == "incomplete"
    counting.run(tmp_path, ["pause=0"])
    check_complete(tmp_path)


def test_cancel_is_a_marker(tmp_path: Path) -> None:
    process = program(tmp_path, "pause=0.3")
    wait_for(lambda: bool(processes_of(tmp_path)))
    RunDir(tmp_path).mark(CANCELLED, "by hand")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "cancelled by hand" in said
    assert not processes_of(tmp_path)
    assert status(counting.open_chain(tmp_path))["state"] == "cancelled"
    counting.run(tmp_path, ["pause=0"])
    check_complete(tmp_path)


def test_independent_stages_share_the_slots(tmp_path: Path) -> None:
    counting.run(tmp_path, ["pause=0.1", "workers=1"])
    double, square = (RunDir(tmp_path).read_manifest(name) for name in ("double", "square"))
    assert double and square
    assert double["started"] < square["finished"] and square["started"] < double["finished"]
