"""Many faults in one chain, drawn from a seed: no record is lost, none is doubled."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))
from chaos import chaos, report  # noqa: E402


def strike(cluster: Testbed, seed: int, faults: int) -> None:
    made = chaos(cluster, seed, faults)
    text, good = report(made, seed)
    print(text)
    assert good, text
    made.run.check()


def test_a_few_faults(cluster: Testbed) -> None:
    strike(cluster, 0, 6)


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_hundred_faults(cluster: Testbed, seed: int) -> None:
    strike(cluster, seed, 100)
