"""A chain on clusters that are set up otherwise."""

from __future__ import annotations

import sys
from pathlib import Path

from testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))
from chains import Run, profile  # noqa: E402

SMALL = ("small=true", "n=24", "per_shard=4")


def test_without_accounting(cluster: Testbed) -> None:
    with cluster.variant("no-accounting"):
        run = Run(cluster)
        run.submit(*SMALL, "pause=2.0", "only=double")
        run.working("double", 2)[0].kill()
        run.check()
        hours = run.status()["hours"]
    noted = sum(entry["seconds"] for role in ("work", "gate") for entry in all_ended(run, role))
    assert noted / 3600 <= hours["core"] < 1


def all_ended(run: Run, role: str) -> list[dict[str, int]]:
    return [entry for stage in run.chain().stages for entry in run.ended(stage, role)]


def test_a_limit_on_jobs(cluster: Testbed) -> None:
    """A quality of service that takes eight jobs and runs two of them at once."""
    asked = profile(qos="few")
    run = Run(cluster, asked)
    done = run.submit("n=24", check=False)
    assert done.returncode == 2 and "QOS few allows 8" in done.stderr
    assert not run.submitted() and not run.queue()
    asked.cpu.workers = 1  # what the refusal advises
    run.write(asked)
    run.submit(*SMALL)
    run.check()


def test_a_submit_filter(cluster: Testbed) -> None:
    with cluster.variant("filter"):
        run = Run(cluster)
        name = f"mkdir -p {run.path}/slurm && echo forbidden >{run.path}/slurm/id"
        cluster.run("sh", "-c", name)
        done = run.submit(*SMALL, check=False)
        assert done.returncode == 2 and "site policy: this name is not allowed" in done.stderr
        assert not run.queue()
        (run.path / "slurm" / "id").unlink()
        run.submit()
        run.check()
