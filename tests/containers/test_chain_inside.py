"""A chain whose payloads run inside an image, by the local executor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hpc"))
import counting

from hpc.container import Container, command, pin
from hpc.driver import drive
from hpc.errors import UserError
from hpc.executors.local import LocalExecutor
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
