"""A chain whose payloads run inside an image, by the local executor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hpc"))
import counting

from hpc import naming, submission
from hpc.cluster import Override, Profile
from hpc.config import dump
from hpc.container import Container, command, pin
from hpc.driver import drive
from hpc.errors import UserError
from hpc.executors.batch import write_host
from hpc.executors.local import LocalExecutor
from hpc.planning import plan_of
from hpc.rundir import STOPPED, Chain, read_json


def opened(run: Path, image: Path | None) -> Chain:
    chain = counting.open_chain(run, ["small=true"])
    if image is not None:
        source = Path(counting.__file__)
        program = ["bash", "-c", 'cp /opt/only-in-the-image . && exec "$@"', "seen"]
        words = [*program, "python", str(source)]
        found = pin(Container(str(image), program=words)).seeing([source.parent])
        chain.command = command(found, run, found.program)
        chain.image = {"path": found.image, "sha256": found.sha256}
    return chain


def test_every_payload_runs_inside(image: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chain = opened(run, image)
    drive(chain, LocalExecutor())
    assert (run / "only-in-the-image").read_text() == "small\n"
    (start,) = read_json(chain.run.provenance)["starts"]
    assert start["image"] == chain.image
    for stage in chain.stages:
        assert chain.run.read_manifest(stage)["image"] == chain.image["sha256"]
    with pytest.raises(UserError, match="was begun in the image .* this is no image"):
        drive(opened(run, None), LocalExecutor())
    drive(opened(run, None), LocalExecutor(), other_image=True)


def test_packages_in_the_way_fail_the_preflight(image: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chain = opened(run, image)
    source = Path(counting.__file__)
    planted = tmp_path / "home" / "packages"
    planted.mkdir(parents=True)
    (planted / "jinja2.py").touch()
    binds = [str(source.parent), str(planted)]
    container = pin(Container(str(image), binds=binds, options=["--env", f"PYTHONPATH={planted}"]))
    words = ["python", str(source), "preflight", str(run), "numbers"]
    done = subprocess.run(
        command(container, run, words, role="preflight"), capture_output=True, text=True
    )
    assert done.returncode == 77, done.stderr
    reason = chain.run.marked(STOPPED) or ""
    assert "shadowed by jinja2" in reason and "\n" not in reason


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" &
  ranks+=($!)
done
for rank in "${ranks[@]}"; do wait "$rank" || status=$?; done
exit ${status:-0}
"""


def test_batch_scripts_as_a_node_runs_them(image: Path, tmp_path: Path) -> None:
    """Preflight, a job of two ranks, its gate; srun stands in (tests/cluster has the real one)."""
    run = tmp_path / "a run"
    chain = counting.open_chain(run, ["small=true", "ranks=true"])
    source = Path(counting.__file__)
    asked = Profile(stages={"numbers": Override(tasks=2)})
    asked.container = Container(
        str(image), program=["python", str(source)], binds=[str(source.parent)], local=True
    )
    asked.scratch = str(tmp_path)
    asked = submission.pinned(chain, asked)
    naming.make_id(chain.run)
    (run / "cluster.yaml").write_text(dump(asked))
    shims = tmp_path / "bin"
    shims.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho node1\n")):
        (shims / name).write_text(text)
        (shims / name).chmod(0o755)
    write_host(run / "slurm")
    texts = {item.file: item.text for item in plan_of(chain, asked)}
    for file in ("preflight", "numbers", "numbers.gate"):
        (run / "slurm" / "logs").mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["bash", "-c", texts[file]],
            capture_output=True,
            text=True,
            cwd=run,
            env={
                "PATH": f"{shims}:/usr/bin:/bin:/usr/sbin:/sbin",
                "SLURM_JOB_ID": "7",
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_JOB_NODELIST": "node1",
            },
        )
        assert done.returncode == 0, f"{file}: {done.stdout}{done.stderr}"
    told = [read_json(run / f"rank{rank}.json") for rank in range(2)]
    assert [(entry["RANK"], entry["WORLD_SIZE"]) for entry in told] == [("0", "2"), ("1", "2")]
    assert chain.run.read_manifest("numbers")["image"] == asked.container.sha256
