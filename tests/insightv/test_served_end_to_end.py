"""The whole chain with its models behind `transformers serve`, whose servers die on the way."""

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from hpc import gates
from hpc.shards import read_groups, shard_paths
from insightv.chain import build

pytestmark = [pytest.mark.full, pytest.mark.timeout(3 * 3600)]

SMOKE = Path(__file__).parents[2] / "configs" / "chain" / "smoke.yaml"
FEWER = [
    "questions.charts={train: 20, validation: 4, test: 8}",
    "questions.reading={train: 4, validation: 2, test: 2}",
    "questions.shapes={train: 4, validation: 2, test: 2}",
    "questions.per_shard=4",
    "local.slots=1",
]
SERVED = "engine={kind: server, device: cpu, threads: 1, server: {command: [transformers]}}"
KILLS = {"r0-generate": 2, "r1-generate": 1}
"""How often the servers of a stage are killed: the generator's, and those of trained agents."""


def start(run: Path, *overrides: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "insightv", "run", SMOKE, *FEWER, *overrides, "--run-dir", run]
    with run.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(list(map(str, words)), stdout=log, stderr=log)


def servers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The servers below a process: the children of their guards."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for below in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "guard.py" in " ".join(below.cmdline()[:3]):
                    found += below.children()
    return found


def kill_servers(process: subprocess.Popen[bytes], run: Path) -> dict[str, int]:
    """Until the run ends: kills a stage's servers once it has finished a shard more."""
    killed: Counter[str] = Counter()
    known: set[int] = set()
    while process.poll() is None:
        time.sleep(0.2)
        for stage, times in KILLS.items():
            folder = run / "stages" / stage
            done = len(list((folder / "shards").glob("*.json")))
            due = killed[stage] < times and done > 2 * killed[stage]
            if not due or (folder / "manifest.json").exists():
                continue
            fresh = [server for server in servers(process) if server.pid not in known]
            for server in fresh:
                known.add(server.pid)
                server.kill()
            killed[stage] += bool(fresh)
    return dict(killed)


def rows(run: Path, stage: str) -> dict[str, list[str]]:
    """The keys of a stage's inputs, each with those of its rows (verdicts and scores have none)."""
    shards = shard_paths(run / "stages" / stage / "shards")
    groups = [group for shard in shards for group in read_groups(shard)]
    return {key: [row.get("key", "") for row in found] for key, found in groups}


def test_the_chain_behind_servers_that_die_is_the_one_in_process(tmp_path):
    plain, served = tmp_path / "plain", tmp_path / "served"
    process = start(plain)
    assert process.wait() == 0, plain.with_suffix(".log").read_text()
    process = start(served, SERVED)
    try:
        killed = kill_servers(process, served)
    finally:
        process.terminate()
    told = served.with_suffix(".log").read_text()
    assert process.returncode == 0, told
    assert killed == KILLS

    chain = build(served)
    assert all(gates.standing(chain).values())
    for stage in chain.stages.values():
        # References are of pairs, which are those of the paths drawn.
        if stage.name.endswith("-reference"):
            assert rows(served, stage.name), stage.name
        elif stage.kind == "map" or stage.name.startswith("questions-"):
            wanted, found = rows(plain, stage.name), rows(served, stage.name)
            assert list(found) == list(wanted), stage.name
            if stage.name.endswith("-generate") or stage.name.startswith("eval-"):
                assert found == wanted, stage.name
                assert all(found.values()), stage.name
    # Each round's own model was served, and the servers that died were started again.
    for stage, model in (("r0", "demo/model "), ("r1", "/reasoning "), ("r2", "/reasoning-r1 ")):
        stage = f"{stage}-generate"
        logs = [log.read_text() for log in (served / "stages" / stage / "logs").glob("server-*")]
        assert any(f"{model}--host" in text.splitlines()[0] for text in logs), stage
        assert {text.count("Uvicorn running") for text in logs} == {1 + KILLS.get(stage, 0)}
    ladders = [json.loads((run / "results.json").read_text())["ladder"] for run in (plain, served)]
    greedy = [[rung for rung in ladder if rung["name"] == "base"] for ladder in ladders]
    assert greedy[0] and greedy[0] == greedy[1]
