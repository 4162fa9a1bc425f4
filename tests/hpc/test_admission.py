"""What keeps a chain that cannot fit out of the queue; the cluster's answers are told here."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import counting  # noqa: E402

from hpc import admission  # noqa: E402
from hpc.admission import admit, fits  # noqa: E402
from hpc.cluster import Override, Profile, Resources  # noqa: E402
from hpc.errors import UserError  # noqa: E402
from hpc.planning import plan_of  # noqa: E402
from hpc.slurm import SlurmError  # noqa: E402
from hpc.submission import submit  # noqa: E402

ANSWERS = {
    "scontrol show config": "MaxArraySize = 100\nMaxJobCount = 10000\n",
    "sinfo": "all|n1|idle|32|200000|gpu:4|\nall|n2|idle|32|200000|gpu:4|\n",
    "scontrol -o show partition": "PartitionName=all State=UP MaxTime=1:00:00 Default=YES\n",
    "sacctmgr": "",
    "squeue": "",
    "sbatch --test-only": "",
}


@pytest.fixture
def cluster(monkeypatch):
    """A cluster's answers by how the question begins, and what was asked."""
    answers, asked = dict(ANSWERS), []

    def call(*words: str, **_: object) -> str:
        said = " ".join(words)
        asked.append(said)
        answer = next(value for begin, value in answers.items() if said.startswith(begin))
        if isinstance(answer, SlurmError):
            raise answer
        return answer

    monkeypatch.setattr(admission.slurm, "call", call)
    monkeypatch.setattr(admission.slurm, "available", lambda: True)
    answers["asked"] = asked
    return answers


def profile(workers: int = 2, **asked: int) -> Profile:
    made = Profile(cpu=Resources(workers=workers, **asked))
    made.submit.per_second = 1000.0
    return made


def told(tmp_path: Path, asked: Profile) -> str:
    planned = plan_of(counting.open_chain(tmp_path / "run", ["workers=50"]), asked)
    return admit(planned, asked)


def test_a_chain_that_fits_is_tried_once_a_kind(tmp_path, cluster):
    assert "11 jobs fit" in told(tmp_path, profile())
    tried = [said for said in cluster["asked"] if said.startswith("sbatch --test-only")]
    assert len(tried) == 3  # gates and preflight; one job; an array of two


@pytest.mark.parametrize(
    ("change", "asked", "said"),
    [
        ({"scontrol show config": "MaxJobCount = 8"}, profile(), "14 jobs.*MaxJobCount is 8"),
        ({}, profile(minutes=90), "cpu.minutes: 90, the partition allows 60"),
        ({}, profile(cores=64), "0 nodes with 64 cores"),
        ({"scontrol show config": "MaxArraySize = 4"}, profile(8), "MaxArraySize is 4"),
        (
            {"sacctmgr --noheader --parsable2 show qos": "few||20|||\n"}
            | {"sacctmgr --noheader --parsable2 show assoc user": "lab||few|few||||\n"},
            profile(6),
            "26 jobs, elements counted; QOS few allows 20",
        ),
        (
            {"sacctmgr --noheader --parsable2 show assoc user": "lab|||||14||\n"}
            | {"squeue": "1|0-1|other|PENDING||0:00|Priority\n"},
            profile(),
            "14 jobs.*beside 2 that you have queued; account lab allows 14",
        ),
        (
            {"sbatch --test-only": SlurmError("sbatch", "site: no such account", False)},
            profile(),
            "site: no such account.*nothing was queued",
        ),
    ],
)
def test_a_chain_that_cannot_fit_is_refused(tmp_path, cluster, change, asked, said):
    answers = change | cluster
    answers.update(change)
    cluster.clear()
    cluster.update(answers)
    with pytest.raises(UserError, match=said) as caught:
        told(tmp_path, asked)
    assert "\n" not in str(caught.value) and "nothing was queued" in str(caught.value)


def test_without_slurm_nothing_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(admission.slurm, "available", lambda: False)
    assert told(tmp_path, profile(1000)).startswith("no Slurm here")


def test_a_stage_that_refuses_what_it_gets_keeps_all_out(tmp_path, cluster):
    chain = counting.open_chain(tmp_path / "run")
    asked = profile(nodes=3)

    def wants_two(resources: Resources) -> str:
        if resources.nodes % 2:
            raise UserError(f"{resources.nodes} nodes; give an even number")
        return "well"

    chain.stages["total"] = replace(chain.stages["total"], fits=wants_two)
    with pytest.raises(UserError, match="3 nodes; give an even number"):
        submit(chain, asked)
    assert not cluster["asked"]
    assert not list(chain.run.path.rglob("*.sh"))
    asked.stages["total"] = Override(nodes=2)
    assert fits(chain, asked) == {"total": "well"}
