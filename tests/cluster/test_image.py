"""Chains on the cluster whose payloads all run inside an image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from chains import PATIENCE, Run, counting, profile, wait_for
from testbed import Testbed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "containers"))
import making  # noqa: E402

from hpc.cluster import Override, read_profile  # noqa: E402
from hpc.container import Container, identify  # noqa: E402
from hpc.rundir import STOPPED, read_json  # noqa: E402

SLOW = ("pause=0.4", "only=double", "small=true")
HOUR = 3600.0
LOCK = "opt/insightv/lock"
MARKER = "opt/only-in-the-image"


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


def another(image: Path, folder: Path) -> Path:
    """The same image, in which the file that only images have says something else."""
    file, target = folder / "other.def", folder / "other.sif"
    file.write_text(f"Bootstrap: localimage\nFrom: {image}\n%post\necho other >/{MARKER}\n")
    words = ["--fakeroot"] if os.geteuid() == 0 else []
    words += ["--mksquashfs-args", "-comp zstd -Xcompression-level 1"]
    subprocess.run(["apptainer", "build", *words, target, file], check=True, capture_output=True)
    return target


def test_a_chain_inside_images(cluster: Testbed, image: Path, tmp_path: Path) -> None:
    """A stage in another than the rest; through a preemption and a gate's retry."""
    run = Run(cluster)
    place = hand_over(cluster, image, run.folder)
    other = hand_over(cluster, another(image, tmp_path), run.folder)
    source = Path(counting.__file__)
    seen = f'cp -n /{MARKER} "$2-$4-$$.seen" 2>/dev/null; exec python "$@"'
    program = ["bash", "-c", seen, "seen", str(source)]
    binds = [f"{source.parent}:{source.parent}:ro"]
    asked = profile(partition="low", stages={"dou*": Override(image=str(other))})
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
    assert start["images"].keys() == {"double"} and start["images"]["double"]["path"] == str(other)
    digests = {stage: run.dir.read_manifest(stage)["image"] for stage in run.chain().stages}
    assert digests.pop("double") == start["images"]["double"]["sha256"]
    assert (
        {*digests.values()} == {start["image"]["sha256"]} != {start["images"]["double"]["sha256"]}
    )
    found: dict[str, set[str]] = {}
    for path in run.path.glob("*.seen"):
        verb, stage, _ = path.name.split("-")
        kind = f"{verb} double" if (verb, stage) == ("work", "double") else verb
        found.setdefault(kind, set()).add(path.read_text().strip())
    assert found == {
        **dict.fromkeys(("work", "gate"), {"small"}),
        "work double": {"other"},
        "preflight": {"small", "other"},
    }


def test_ranks_inside_an_image(cluster: Testbed, image: Path) -> None:
    """The other stages, the gates and the preflight's first half are on the host."""
    run = Run(cluster)
    place = hand_over(cluster, image, run.folder)
    source = Path(counting.__file__)
    wide = Override(nodes=2, tasks=2, image=str(place))
    asked = profile(stages={"numbers": wide})
    asked.container = Container(program=["python", str(source)], binds=[str(source.parent)])
    run.write(asked)
    run.submit("small=true", "ranks=true")
    run.check()
    told = [read_json(run.path / f"rank{rank}.json") for rank in range(4)]
    assert [entry["WORLD_SIZE"] for entry in told] == ["4"] * 4
    assert [entry["LOCAL_RANK"] for entry in told] == ["0", "1", "0", "1"]
    digests = {stage: run.dir.read_manifest(stage)["image"] for stage in run.chain().stages}
    assert digests == dict.fromkeys(digests) | {"numbers": identify(place)[0]}


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


class Whole(Run):
    """The method's chain, whose payloads are the image's own package."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.seen: set[tuple[str, bool]] = set()

    def command(self, verb: str, *words: str | Path) -> list[str | Path]:
        return [sys.executable, "-m", "insightv", verb, self.path, *words]

    def start(self, chain: str) -> None:
        words = ["--cluster", self.profile, "--run-dir", self.path]
        file = making.ROOT / "configs" / "chain" / f"{chain}.yaml"
        self.cluster.run(
            *(sys.executable, "-m", "insightv", "submit", file, *words),
            cwd=self.folder,
            timeout=PATIENCE,
        )

    def look(self) -> None:
        """Notes which Pythons at work for the run see a file that only the image has."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or [""]
            if "python" in Path(line[0]).name and str(self.path) in line:
                inside = Path("/proc", str(process.pid), "root", LOCK).exists()
                if inside or alive(process):
                    self.seen.add((line[line.index(str(self.path)) - 1], inside))

    def wait(self, seconds: float = PATIENCE) -> None:
        finished = self.path / "slurm" / "finished"

        def over() -> bool:
            self.look()
            return finished.exists() or self.dir.marked(STOPPED) is not None

        wait_for(over, seconds, 1.0, self.say)
        assert self.dir.marked(STOPPED) is None
        wait_for(lambda: not self.queue(), say=self.say)


@pytest.fixture(scope="module")
def cpu_image(testbed: Testbed, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cpu.sif`` as its admin builds it: bundled, built without internet, checked."""
    folder = tmp_path_factory.mktemp("cpu")
    bundle, target = folder / "bundle", folder / "cpu.sif"
    root = ["--fakeroot"] if os.geteuid() == 0 else []
    for words in (
        ("image", "bundle", "cpu", "--to", bundle, "--base", base),
        ("image", "build", "cpu", "--to", target, "--offline", bundle, *root),
        ("image", "check", target, "--run-dir", folder / "checked"),
    ):
        done = making.insightv(*words, timeout=3600)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(bundle)
    testbed.wait_ready()  # a machine that is busy building may not answer its controller in time
    return hand_over(testbed, target, testbed.folder("cpu"))


@pytest.mark.timeout(3 * HOUR)
def test_the_quickstart_inside_the_cpu_image(cluster: Testbed, cpu_image: Path) -> None:
    """Every payload, through a preemption and a gate's retry."""
    asked = read_profile(making.ROOT / "configs" / "cluster" / "testbed-apptainer.yaml")
    asked.partition, asked.container.image = "low", str(cpu_image)
    run = Whole(cluster, asked)
    run.start("quickstart")
    wait_for(lambda: run.nodes("r0-generate"), HOUR, say=run.say)
    words = ("sbatch", "-p", "high", "--exclusive", "-N", "4", "-t", "1", "--wrap", "sleep 10")
    cluster.run(*words, "--output=/dev/null")
    wait_for(lambda: "preempted" in states(cluster, run, "r0-generate"), say=run.say)
    wait_for(lambda: run.nodes("r1-generate"), HOUR, say=run.say)
    run.kill("r1-generate")
    run.wait(2 * HOUR)
    assert {e["attempt"] for e in run.submitted() if e["stage"] == "r1-generate"} == {0, 1}
    assert ("work", True) in run.seen and all(inside for _, inside in run.seen), run.seen
    (start,) = read_json(run.dir.provenance)["starts"]
    assert start["image"]["path"] == str(cpu_image)
    manifests = {
        path.parent.name: read_json(path) for path in run.path.glob("stages/*/manifest.json")
    }
    assert manifests.keys() == {entry["stage"] for entry in run.submitted()} - {"preflight"}
    for manifest in manifests.values():
        assert manifest["image"] == start["image"]["sha256"]
    assert read_json(run.path / "results.json")["ladder"]


def alive(process: psutil.Process) -> bool:
    """Whether it has not ended in the meantime, waited for or not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def states(cluster: Testbed, run: Run, stage: str) -> set[str]:
    """What accounting says became of a stage's job, each of its starts counted."""
    job = run.job("work", stage)
    said = cluster.run("sacct", "-X", "-n", "-P", "-D", "--format=State", "-j", job).stdout
    return {line.partition(" ")[0].lower() for line in said.splitlines()}
