"""The whole chain with its models behind `transformers serve`, whose servers die on the way."""

import contextlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hpc import gates
from hpc.shards import read_groups, shard_paths
from insightv.chain import build
from insightv.evaluation.statistics import paired_difference

pytestmark = [pytest.mark.full, pytest.mark.timeout(3 * 3600)]

CHAINS = Path(__file__).parents[2] / "configs" / "chain"
FEWER = [
    "questions.charts={train: 20, validation: 4, test: 8}",
    "questions.reading={train: 4, validation: 2, test: 2}",
    "questions.shapes={train: 4, validation: 2, test: 2}",
    "questions.per_shard=4",
]
SERVED = "engine={kind: server, device: cpu, threads: 1, server: {command: [transformers]}}"
KILLS = {"r0-generate": 2, "r1-generate": 1}
"""How often the servers of a stage are killed: the generator's, and those of trained agents."""
UNTRAINED = ("eval-base", "eval-base-reasoning")
"""What the base answers, greedily: the same text from whatever runs it."""


def start(run: Path, chain: str, *overrides: str) -> subprocess.Popen[bytes]:
    told = CHAINS / f"{chain}.yaml"
    words = [sys.executable, "-m", "insightv", "run", told, *overrides, "--run-dir", run]
    with run.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(list(map(str, words)), stdout=log, stderr=log)


def servers(process: subprocess.Popen[bytes], logs: Path) -> Iterator[psutil.Process]:
    """The servers below a process that write their logs into a folder: their guards' children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for below in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                if "guard.py" in " ".join(below.cmdline()[:3]):
                    for server in below.children():
                        if Path(f"/proc/{server.pid}/fd/1").readlink().parent == logs:
                            yield server


def kill_servers(
    process: subprocess.Popen[bytes], run: Path
) -> tuple[dict[str, int], dict[str, set[int]]]:
    """Until the run ends: kills all servers of a stage whenever it has finished a shard more.

    Returns:
        How often there was something to kill in each stage, and the processes that were killed.
    """
    rounds: Counter[str] = Counter()
    killed: dict[str, set[int]] = {stage: set() for stage in KILLS}
    while process.poll() is None:
        time.sleep(0.2)
        for stage, times in KILLS.items():
            folder = run / "stages" / stage
            done = len(list((folder / "shards").glob("*.json")))
            due = rounds[stage] < times and done > 2 * rounds[stage]
            if not due or (folder / "manifest.json").exists():
                continue
            found = list(servers(process, folder / "logs"))
            for server in found:
                if server.pid not in killed[stage]:
                    server.kill()
            rounds[stage] += any(server.pid not in killed[stage] for server in found)
            killed[stage] |= {server.pid for server in found}
    return dict(rounds), killed


def rows(run: Path, stage: str) -> dict[str, list[str]]:
    """The keys of a stage's inputs, each with those of its rows (verdicts and scores have none)."""
    shards = shard_paths(run / "stages" / stage / "shards")
    groups = [group for shard in shards for group in read_groups(shard)]
    return {key: [row.get("key", "") for row in found] for key, found in groups}


def said(run: Path, stage: str) -> list[tuple[str, str, str]]:
    """What a rung answered to each question, and its reasoning."""
    shards = shard_paths(run / "stages" / stage / "shards")
    found = [row for shard in shards for _, group in read_groups(shard) for row in group]
    return [(row["question"], row["answer"], row.get("reasoning", "")) for row in found]


def right(run: Path) -> dict[str, bool]:
    """Each path of round 0 with whether its answer is right; a path that failed is not."""
    judged = {
        row["path"]: bool(row["correct"])
        for shard in shard_paths(run / "stages" / "r0-judge" / "shards")
        for _, found in read_groups(shard)
        for row in found
    }
    drawn = [key for keys in rows(run, "r0-generate").values() for key in keys]
    return {key: judged.get(key, False) for key in drawn}


@pytest.mark.parametrize(
    ("chain", "overrides"), [("smoke", FEWER), ("quickstart", [])], ids=["smoke", "quickstart"]
)
def test_the_chain_behind_servers_that_die_is_the_one_in_process(tmp_path, chain, overrides):
    plain, served = tmp_path / "plain", tmp_path / "served"
    process = start(plain, chain, *overrides)
    assert process.wait() == 0, plain.with_suffix(".log").read_text()
    process = start(served, chain, *overrides, SERVED)
    try:
        rounds, killed = kill_servers(process, served)
    finally:
        process.terminate()
    told = served.with_suffix(".log").read_text()
    assert process.returncode == 0, told
    assert rounds == KILLS
    compare(plain, served)
    each_was_served(served, killed)


def compare(plain: Path, served: Path) -> None:
    """The same rows; the same answers where nothing is drawn, as good ones where it is."""
    chain = build(served)
    assert all(gates.standing(chain).values())
    for stage in chain.stages.values():
        # References are of pairs, which are those of the paths drawn.
        if stage.name.endswith("-reference"):
            assert rows(served, stage.name), stage.name
        elif stage.kind == "map" or stage.name.startswith("questions-"):
            wanted, found = rows(plain, stage.name), rows(served, stage.name)
            assert list(found) == list(wanted), stage.name
            if stage.name.startswith("eval-"):
                assert found == wanted, stage.name
                assert all(found.values()), stage.name
            elif stage.name.endswith("-generate"):
                # A question without rows drew bad paths alone, and stands among the errors.
                both = [key for key in wanted if wanted[key] and found[key]]
                assert len(both) >= 0.99 * len(wanted), stage.name
                assert all(found[key] == wanted[key] for key in both), stage.name
    for stage in UNTRAINED:
        assert said(served, stage) == said(plain, stage)
    wanted, found = right(plain), right(served)
    both = [key for key in wanted if key in found]
    drawn = [found[key] for key in both], [wanted[key] for key in both]
    difference = paired_difference(*drawn, [key.split("/")[0] for key in both])
    print(f"{len(both)} paths, {sum(drawn[1])} right in process, {sum(drawn[0])} served;")
    print(f"difference {difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]")
    assert difference.low <= 0 <= difference.high


def each_was_served(run: Path, killed: dict[str, set[int]]) -> None:
    """Each round's own model was served, and the servers that died were started again."""
    for stage, model in (("r0", "demo/model "), ("r1", "/reasoning "), ("r2", "/reasoning-r1 ")):
        stage = f"{stage}-generate"
        logs = [log.read_text() for log in (run / "stages" / stage / "logs").glob("server-*")]
        assert any(f"{model}--host" in text.splitlines()[0] for text in logs), stage
        started = sum(text.count("Uvicorn running") for text in logs)
        assert started == len(logs) + len(killed.get(stage, ())), stage
