"""The cluster of the tests: our own where this machine can have it, else a Slurm that is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testbed import Settings, Site, Testbed, answers, obstacle


def pytest_collection_modifyitems(items):
    """A test here may wait for Slurm; the fixture's own start may install packages."""
    for item in items:
        if {"cluster", "slurm"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def testbed() -> Iterator[Testbed]:
    """A running test cluster; one that was up before stays up."""
    if reason := obstacle():
        pytest.skip(reason)
    cluster = Testbed()
    found = cluster.running()
    seconds = cluster.up(cluster.settings if found else Settings())
    print(f"test cluster: {len(cluster.settings.names)} nodes in {seconds:.1f} s")
    cluster.reset()
    yield cluster
    cluster.reset()
    if not found:
        cluster.down()


@pytest.fixture
def cluster(testbed: Testbed) -> Iterator[Testbed]:
    """The cluster as a test wants it: no job, no fault, every node idle."""
    yield testbed
    testbed.reset()


@pytest.fixture
def slurm(request: pytest.FixtureRequest) -> Testbed | Site:
    """For tests that break nothing: the test cluster, else the Slurm that is there."""
    if obstacle() and answers():
        return Site()
    cluster: Testbed = request.getfixturevalue("cluster")
    return cluster
