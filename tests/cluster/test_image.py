"""Chains on the cluster whose payloads all run inside an image."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from chains import Run, counting, profile, wait_for
from testbed import Testbed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "containers"))
import making  # noqa: E402

from hpc.cluster import Resources  # noqa: E402
from hpc.container import Container  # noqa: E402
from hpc.rundir import read_json  # noqa: E402

SLOW = ("pause=0.4", "only=double", "small=true")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := making.obstacle():
        pytest.skip(reason)
    return making.base(tmp_path_factory.mktemp("base") / "root")


@pytest.fixture(scope="module")
def image(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.build(tmp_path_factory.mktemp("image"), base)


def hand_over(cluster: Testbed, image: Path, folder: Path) -> Path:
    """The image where every node's user reads it."""
    place = folder / image.name
    shutil.copy(image, place)
    os.chown(place, cluster.settings.uid, cluster.settings.uid)
    return place


def test_a_chain_inside_an_image(cluster: Testbed, image: Path) -> None:
    """Through a preemption and a gate's retry."""
    run = Run(cluster)
    place = hand_over(cluster, image, run.folder)
    source = Path(counting.__file__)
    seen = 'cp -n /opt/only-in-the-image "$2-$$.seen" 2>/dev/null; exec python "$@"'
    program = ["bash", "-c", seen, "seen", str(source)]
    binds = [f"{source.parent}:{source.parent}:ro"]
    asked = profile(partition="low")
    asked.container = Container(str(place), program=program, binds=binds, local=True)
    run.write(asked)
    run.submit(*SLOW)
    run.working("double", 2)
    words = ("sbatch", "-p", "high", "--exclusive", "-N", "4", "-t", "1", "--wrap", "sleep 10")
    cluster.run(*words, "--output=/dev/null")
    wait_for(lambda: any(e["asked"] == "leave" for e in run.ended("double")), say=run.say)
    run.working("double", 2)
    run.kill("double")
    run.check()
    attempts = {entry["attempt"] for entry in run.submitted() if entry["stage"] == "double"}
    assert attempts == {0, 1}, run.say()
    (start,) = read_json(run.dir.provenance)["starts"]
    assert start["image"]["path"] == str(place)
    for stage in run.chain().stages:
        assert run.dir.read_manifest(stage)["image"] == start["image"]["sha256"]
    verbs = {path.name.partition("-")[0] for path in run.path.glob("*.seen")}
    assert verbs == {"work", "gate", "preflight"}


def test_ranks_inside_an_image(cluster: Testbed, image: Path) -> None:
    run = Run(cluster)
    place = hand_over(cluster, image, run.folder)
    source = Path(counting.__file__)
    wide = Resources(memory="400M", nodes=2, tasks=2, minutes=10)
    asked = profile(stages={"numbers": wide})
    asked.container = Container(
        str(place), program=["python", str(source)], binds=[str(source.parent)]
    )
    run.write(asked)
    run.submit("small=true", "ranks=true")
    run.check()
    told = [read_json(run.path / f"rank{rank}.json") for rank in range(4)]
    assert [entry["WORLD_SIZE"] for entry in told] == ["4"] * 4
    assert [entry["LOCAL_RANK"] for entry in told] == ["0", "1", "0", "1"]


def test_an_image_that_changes_ends_the_chain(cluster: Testbed, image: Path) -> None:
    run = Run(cluster)
    place = hand_over(cluster, image, run.folder)
    source = Path(counting.__file__)
    asked = profile()
    asked.container = Container(
        str(place), program=["python", str(source)], binds=[str(source.parent)]
    )
    asked.container.sha256 = "0" * 64
    run.write(asked)
    done = run.submit("small=true", check=False)
    assert done.returncode == 2 and "is another image or a broken copy" in done.stderr
    assert not run.queue(), "nothing may be queued"
    asked.container.sha256 = ""
    run.write(asked)
    run.submit(*SLOW)
    run.working("double")
    with place.open("ab") as file:
        file.write(b"more")
    assert "is another image now" in run.halted()
    assert not run.queue()


@pytest.mark.full
@pytest.mark.timeout(14400)
def test_the_quickstart_inside_the_cpu_image(cluster: Testbed, base: Path) -> None:
    folder = cluster.folder("quickstart")
    bundle, target = folder / "bundle", folder / "cpu.sif"
    root = ["--fakeroot"] if os.geteuid() == 0 else []
    for words in (
        ("image", "bundle", "cpu", "--to", bundle, "--base", base),
        ("image", "build", "cpu", "--to", target, "--offline", bundle, *root),
        ("image", "check", target, "--run-dir", folder / "checked"),
    ):
        done = making.insightv(*words, timeout=7200)
        assert done.returncode == 0, done.stdout + done.stderr
    os.chown(target, cluster.settings.uid, cluster.settings.uid)
    configs = making.ROOT / "configs"
    command = [sys.executable, "-m", "insightv"]
    run = folder / "run"
    profile = configs / "cluster" / "testbed-apptainer.yaml"
    chain = configs / "chain" / "quickstart.yaml"
    words = ["submit", chain, "--cluster", profile, "--run-dir", run]
    cluster.run(*command, *words, cwd=folder, timeout=600)
    finished = run / "slurm" / "finished"
    stopped = run / "STOPPED"
    wait_for(lambda: finished.exists() or stopped.exists(), 10800, 10.0)
    assert not stopped.exists(), stopped.read_text()
    (start,) = read_json(run / "provenance.json")["starts"]
    assert start["image"]["path"] == str(target)
    manifests = list(run.glob("stages/*/manifest.json"))
    assert manifests
    for path in manifests:
        assert read_json(path)["image"] == start["image"]["sha256"]
