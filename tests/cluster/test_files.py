"""A chain on a real Slurm while its file system fails, lags or lies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))
from chains import Run, profile, wait_for  # noqa: E402

from hpc.cluster import Override  # noqa: E402
from hpc.shards import shard_path, sidecar_path  # noqa: E402

SLOW = ("small=true", "n=24", "per_shard=4", "pause=1.0", "only=double")


@pytest.fixture(scope="module")
def faulty(testbed: Testbed) -> Path:
    """The library that makes files and clocks of a node's jobs misbehave."""
    made = testbed.folder("faulty") / "faulty.so"
    source = Path(__file__).with_name("faulty.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


def inject(cluster: Testbed, node: str, library: Path, **what: object) -> None:
    asked = {f"FAULTY_{name.upper()}": str(value) for name, value in what.items()}
    cluster.inject(node, {"LD_PRELOAD": str(library), **asked})


def test_a_full_disk(cluster: Testbed) -> None:
    folder = cluster.layout.small / "run"
    folder.mkdir()
    os.chown(folder, cluster.settings.uid, cluster.settings.uid)
    run = Run(cluster, folder=folder)
    run.submit(*SLOW)
    run.working("double", 2)
    fill = cluster.layout.small / "fill"
    cluster.run("dd", "if=/dev/zero", f"of={fill}", "bs=4k", check=False)
    wait_for(lambda: not run.queue(), say=run.say)
    fill.unlink()
    assert run.status()["state"] == "stopped"
    run.submit()
    run.check()


def test_files_that_fail_on_a_node_and_are_seen_late_by_the_others(
    cluster: Testbed, faulty: Path
) -> None:
    run = Run(cluster)
    failing, *late = cluster.settings.names  # Slurm fills the first node first
    inject(cluster, failing, faulty, under=".part", every=10)
    for node in late:
        inject(cluster, node, faulty, under=f"{run.path}/stages/", late=4)
    run.submit(*SLOW)
    run.check()
    failed = [e for stage in ("numbers", "double") for e in run.ended(stage) if e["status"] == 1]
    assert {entry["node"] for entry in failed} == {failing}
    retry = failed[0]["name"].replace("-a0", "-a1")
    script = (run.path / "slurm" / f"{retry}.sh").read_text()
    assert f"#SBATCH --exclude={failing}\n" in script


def test_clocks_an_hour_apart(cluster: Testbed, faulty: Path) -> None:
    whole = Override(memory="400M", minutes=20, workers=2, cores=cluster.settings.cpus)
    run = Run(cluster, profile(stages={"double": whole}))
    inject(cluster, "node1", faulty, clock=3600)
    run.submit(*SLOW)
    run.working("double", 2)[0].kill()
    run.check()
    times = {entry["node"]: entry["time"] for entry in run.ended("double")}
    assert len(times) == 2 and abs(times["node1"] - times["node2"]) > 3000
    assert run.status()["hours"]["core"] < 1


def test_a_shard_whose_bytes_change(cluster: Testbed) -> None:
    asked = profile()
    asked.gate.retries = 0
    run = Run(cluster, asked)
    run.submit("n=24", "fault=total:user")
    run.halted()
    shard = shard_path(run.dir.shards("double"), 3)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run.submit("fault=none")
    assert str(shard) in run.halted()
    shard.unlink()
    sidecar_path(shard).unlink()
    run.submit()
    run.check()
