"""Slurm's words about itself, and a profile held against them without a cluster."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hpc import facts, site
from hpc.cluster import Profile, Resources, read_profile
from hpc.errors import UserError
from hpc.site import Node, Partition

PROFILES = sorted((Path(__file__).parents[2] / "configs" / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_profiles_are_read(path):
    read_profile(path)


def test_there_are_three_starting_points_and_the_testbed():
    assert {path.stem for path in PROFILES} >= {
        "testbed",
        "apptainer",
        "preemptible",
        "no-submit",
    }


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("1:30", 1.5),
        ("02:00:00", 120),
        ("1-0", 1440),
        ("2-12", 3600),
        ("1-02:30", 1590),
        ("1-00:00:30", 1440.5),
        ("UNLIMITED", math.inf),
        ("", math.inf),
    ],
)
def test_times_as_slurm_writes_them(text, minutes):
    assert facts.duration(text) == minutes


@pytest.mark.parametrize("text", ["soon", "1-", "1:2:3:4", "-5"])
def test_no_time_is_refused(text):
    with pytest.raises(UserError):
        facts.duration(text)


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu:4", 4),
        ("gpu:a100:8(S:0-1)", 8),
        ("gpu:a100:2,gpu:v100:2", 4),
        ("shard:8", 0),
        ("(null)", 0),
    ],
)
def test_gpus_of_gres(gres, count):
    assert facts._gpus(gres) == count


@pytest.fixture
def slurm(monkeypatch):
    """A cluster of two partitions, told as sinfo, scontrol and sacctmgr do."""
    answers = {
        "scontrol show config": "ClusterName = far\nSLURM_VERSION = 23.02.6\nMaxArraySize = 100\n",
        "sinfo": "gpu|g1|idle|32|200000|gpu:a100:4(S:0)|a100,ib\n"
        "gpu|g2|drained|32|200000|gpu:4|a100\n"
        "cpu|c1|mixed|64|100000|(null)|\n",
        "scontrol -o show partition": "PartitionName=gpu State=UP MaxTime=1-00:00:00 AllowQos=ALL "
        "AllowAccounts=lab PreemptMode=CANCEL\n"
        "PartitionName=cpu State=UP MaxTime=UNLIMITED Default=YES\n",
        "sacctmgr --noheader --parsable2 show assoc": "lab||normal,few|normal||||\n",
        "sacctmgr --noheader --parsable2 show qos": "normal|||||\nfew|2|4|||01:00:00\n",
    }

    def call(*words: str, **_: object) -> str:
        said = " ".join(words)
        return next(answer for begin, answer in answers.items() if said.startswith(begin))

    monkeypatch.setattr(facts.slurm, "call", call)
    return answers


def found(profile: Profile, level: str) -> list[str]:
    return [f"{one.about}: {one.said}" for one in site.check(profile) if one.level == level]


def fitting() -> Profile:
    profile = Profile(partition="gpu", cpu=Resources(partition="cpu"))
    profile.gate.partition = "cpu"
    return profile


def test_a_profile_that_fits(slurm):
    assert found(fitting(), "wrong") == []
    assert any("2 nodes with 4 cores, 1 GPUs, limit 1440 min" in x for x in found(fitting(), "ok"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"partition": "gpus"}, "gpu.partition: gpus: there is cpu, gpu"),
        ({"minutes": 1441}, "gpu.minutes: 1441, the partition allows 1440"),
        ({"gpus": 8}, "0 nodes with 4 cores, 8 GPUs, 1 needed; the largest has 32 cores, 4 GPUs"),
        ({"memory": "300G"}, "0 nodes with 4 cores, 1 GPUs, 300G, 1 needed"),
        ({"nodes": 3}, "2 nodes with 4 cores, 1 GPUs, 3 needed"),
        ({"constraint": "h100"}, "0 nodes with"),
        ({"workers": 101}, "gpu.workers: 101, MaxArraySize is 100"),
        ({"account": "other"}, "gpu.account: other; the partition takes lab"),
        ({"account": "other"}, "gpu.account: other is none of yours; choose of lab"),
        ({"qos": "gold"}, "gpu.qos: gold is not allowed; choose of few, normal"),
        ({"qos": "few"}, "gpu.workers: 4 workers and their gates; QOS few allows 4 jobs"),
        ({"qos": "few", "minutes": 90}, "gpu.minutes: 90; QOS few allows 60 min"),
    ],
)
def test_what_does_not_fit_is_named(slurm, change, said):
    profile = fitting()
    for name, value in change.items():
        setattr(profile.gpu, name, value)
    wrong = found(profile, "wrong")
    assert any(said in line for line in wrong), wrong


def test_what_is_worth_knowing(slurm):
    profile = fitting()
    profile.gpu.nodes = 2
    notes = found(profile, "note")
    assert any("only 1 of them are up" in line for line in notes)
    assert any("preemption cancels jobs" in line for line in notes)


def test_kinds_that_ask_alike_are_one(slurm):
    titles = [kind.title for kind in site.kinds(fitting())]
    assert titles == ["cpu/gate", "gpu/training"]


def test_a_drained_node_is_not_usable():
    node = Node("n", "drained*", 1, 1, 0, frozenset())
    assert not node.usable
    assert Partition({}, (node,)).minutes == math.inf
