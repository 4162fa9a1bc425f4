"""The whole method on the cluster: what comes out is what comes out on one machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))
from chains import wait_for  # noqa: E402

from hpc.rundir import RunDir  # noqa: E402
from hpc.shards import read_groups, shard_path, sidecars  # noqa: E402

ROOT = Path(__file__).parents[2]
PROFILE = "configs/cluster/testbed.yaml"
INSIGHTV = (sys.executable, "-m", "insightv")
HOURS = 2 * 3600.0


@pytest.mark.full  # every stage of the method, training included, twice
@pytest.mark.timeout(2 * HOURS)
@pytest.mark.parametrize("name", ["smoke", "quickstart"])
def test_a_cluster_makes_what_one_machine_makes(cluster: Testbed, name: str) -> None:
    folder, chain = cluster.folder(name), f"configs/chain/{name}.yaml"
    here, there = folder / "here", folder / "there"
    words = ("submit", chain, "--cluster", PROFILE, "--run-dir", there)
    cluster.run(*INSIGHTV, *words, cwd=ROOT, timeout=HOURS)
    cluster.run(*INSIGHTV, "run", chain, "--run-dir", here, cwd=ROOT, timeout=HOURS)
    wait_for(lambda: status(cluster, there)["state"] != "running", HOURS, 20.0)
    found = status(cluster, there)
    assert found["state"] == "complete", found["reason"]
    assert {stage["state"] for stage in found["stages"]} == {"complete"}
    assert not cluster.run("squeue", "--noheader").stdout
    assert differences(here, there) == []
    assert min(stage["hours"]["core"] for stage in found["stages"]) > 0
    assert all(stage["shards"].keys() == {"done", "total"} for stage in found["stages"])
    # Models used GPUs, and told tokens for their hours.
    told = {stage["name"]: stage.get("per_gpu_hour", {}) for stage in found["stages"]}
    assert all(told[name]["tokens"] > 0 for name in ("r0-generate", "sft-reasoning", "eval-base"))
    jobs = ",".join(e["job"] for e in RunDir(there).read_jobs() if e.get("event") == "submitted")
    said = cluster.run("sacct", "-X", "-n", "-P", "--format=JobName,State", "-j", jobs).stdout
    ends = dict(line.split("|") for line in said.splitlines())
    # Elements that came too late were not needed: whoever completed the stage cancelled them.
    assert {end.partition(" ")[0] for end in ends.values()} <= {"COMPLETED", "CANCELLED"}
    assert not [name for name, end in ends.items() if ".gate-" in name and end != "COMPLETED"]


def status(cluster: Testbed, run: Path) -> dict[str, Any]:
    return json.loads(cluster.run(*INSIGHTV, "status", run, "--json", timeout=HOURS).stdout)


def differences(one: Path, other: Path) -> list[str]:
    """In which stages, keys and shapes of results two runs differ.

    Keys that hang on what a model said (paths that failed, pairs that were found) may differ
    where batches were put together otherwise; those of questions and predictions may not.
    """
    names = [sorted(path.name for path in (run / "stages").iterdir()) for run in (one, other)]
    if names[0] != names[1]:
        return [f"stages: {names[0]} and {names[1]}"]
    found = []
    for name in names[0]:
        if name.startswith(("questions", "eval", "r0", "r1-generate", "r2-generate")):
            if keys(one, name) != keys(other, name):
                found.append(f"keys of {name}")
        elif bool(keys(one, name)) != bool(keys(other, name)):
            found.append(f"{name} is empty in one of them")
    shapes = [shape(json.loads((run / "results.json").read_text())) for run in (one, other)]
    if shapes[0] != shapes[1]:
        found.append("the shape of results.json")
    return found


def keys(run: Path, stage: str) -> list[str]:
    folder = RunDir(run).shards(stage)
    return sorted(
        key for index in sidecars(folder) for key, _ in read_groups(shard_path(folder, index))
    )


def shape(value: Any) -> Any:
    """The names in a value, and the kinds of what stands under them.

    What is counted by kind (failures by reason, say) has the names of the kinds that were met.
    """
    if isinstance(value, dict):
        if all(isinstance(item, int) for item in value.values()):
            return "counts"
        return {name: shape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return "number" if isinstance(value, int | float | None) else type(value).__name__
