"""`insightv cluster check` on the real cluster."""

from __future__ import annotations

import sys
from pathlib import Path

PROFILE = Path(__file__).parents[2] / "configs" / "cluster" / "testbed.yaml"


def check(cluster, profile: Path, place: Path, *words: str):
    command = [sys.executable, "-m", "insightv", "cluster", "check", "--cluster", profile]
    return cluster.run(*command, "--run-dir", place, *words, check=False, timeout=600)


def test_the_testbed_and_its_profile_fit(cluster):
    place = cluster.folder("check")
    done = check(cluster, PROFILE, place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong" not in done.stdout
    for line in (
        "file system, exclusive create: ",
        "file system, exclusive link: ",
        "file system, rename: whole texts only",
        "GPUs: 1, nvidia-smi is not there",
        "program: insightv ",
        "inodes: ",
    ):
        assert line in done.stdout, done.stdout
    assert not list(place.iterdir())
    assert not cluster.run("squeue", "-h").stdout


def test_what_must_be_mended_is_named(cluster):
    place = cluster.folder("check")
    profile = place / "wrong.yaml"
    profile.write_text(
        "partition: short\nqos: few\ngpu: {gpus: 5}\nstages: {x: {partition: far}}\n"
    )
    done = check(cluster, profile, place, "--minutes=0")
    assert done.returncode == 2
    for said in (
        "wrong  cpu.minutes: 60, the partition allows 1; ask for less",
        "wrong  gpu in short: 0 nodes with 4 cores, 5 GPUs, 1 needed",
        "wrong  x.partition: far: there is batch, high, low, short",
        "note   cpu.workers: 2 of 4 will run at once (QOS few)",
    ):
        assert said in done.stdout, done.stdout


def test_a_program_that_is_not_there_is_found_on_the_nodes(cluster):
    place = cluster.folder("check")
    profile = place / "image.yaml"
    profile.write_text("container: {image: /images/none.sif}\ngpu: {image: /images/other.sif}\n")
    done = check(cluster, profile, place)
    assert done.returncode == 2
    assert "container: /images/none.sif is not there" in done.stdout, done.stdout
    assert "gpu on node1, container: /images/other.sif is not there" in done.stdout, done.stdout
    assert "program: does not start (status 77" in done.stdout
