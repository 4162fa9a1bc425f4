"""What probes found on nodes, in words."""

from __future__ import annotations

import pytest

from hpc.probing import _of_gpus


@pytest.mark.parametrize(
    ("torch", "driver", "level", "said"),
    [
        ("0 torch 2.13.0 (CUDA 13.0) sees 4, H200", "H200, 580", "ok", "sees 4, H200"),
        ("1 torch 2.13.0 (no CUDA) sees no GPU", "H200, 580", "wrong", "install the CUDA build"),
        ("1 torch 2.13.0 (no CUDA) sees no GPU", None, "note", "sees no GPU"),
        ("2 insightv: No such command 'gpus'.", "H200, 580", "note", "cannot be asked"),
    ],
)
def test_a_torch_that_does_not_see_the_gpus(torch, driver, level, said):
    known = {"gpus": ["4"], "seen": [torch], **({"driver": [driver]} if driver else {})}
    found = [one for one in _of_gpus("gpu on g1", known, 4) if one.about.endswith("torch")]
    assert [one.level for one in found] == [level]
    assert said in found[0].said


def test_torch_is_not_asked_where_gpus_lack():
    found = list(_of_gpus("gpu on g1", {"gpus": ["0"], "seen": ["1 no GPU"]}, 4))
    assert [one.about for one in found] == ["gpu on g1, GPUs"]
