"""``retry --other-image`` on a cluster: the digests that the run keeps are no longer asked for."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc.cluster import Profile
from hpc.config import dump
from hpc.container import Container, Pin
from hpc.rundir import RunDir
from hpc.submission import profile_path
from insightv.cli import cluster, runs


@pytest.mark.parametrize("other", [True, False])
def test_a_retry_goes_on_in_another_image(tmp_path: Path, monkeypatch, other: bool) -> None:
    kept = Profile(container=Container("/a.sif", sha256="1" * 64), pins={"/b.sif": Pin("2" * 64)})
    chain = SimpleNamespace(run=RunDir(tmp_path))
    profile_path(chain.run).write_text(dump(kept))
    sent: list[tuple[Profile, bool]] = []
    monkeypatch.setattr(runs, "opened", lambda directory: chain)
    monkeypatch.setattr(
        cluster, "send", lambda chain, profile, other_image: sent.append((profile, other_image))
    )
    runs.retry(tmp_path, other_image=other)
    if other:
        kept.container.sha256, kept.pins = "", {}
    assert sent == [(kept, other)]
