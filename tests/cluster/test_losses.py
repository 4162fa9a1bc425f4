"""A kill costs at most a minute of one worker."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))
from losses import MINUTE, losses  # noqa: E402


@pytest.mark.full  # frames are closed after most of a minute
@pytest.mark.timeout(3600)
def test_what_kills_cost(cluster: Testbed) -> None:
    found = losses(cluster, 0, 8)
    print(*found, sep="\n")
    assert max(loss.seconds for loss in found) <= MINUTE, found
    assert any(loss.records for loss in found), "nothing was at stake"
