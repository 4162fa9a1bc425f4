"""A training on two nodes × two ranks, inside a chain, preempted on the way."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "insightv"))
import training_chain  # noqa: E402
from chains import Run, profile, wait_for  # noqa: E402

from hpc.cluster import Resources  # noqa: E402
from hpc.disk import share  # noqa: E402

pytest.importorskip("megatron.core", reason="megatron-core is not installed")


class Training(Run):
    """`training_chain`, driven from outside."""

    def command(self, verb: str, *words: str | Path) -> list[str | Path]:
        return [sys.executable, training_chain.__file__, verb, self.path, *words]

    def chain(self) -> Any:
        return training_chain.make_chain(self.path)

    def losses(self) -> list[dict[str, Any]]:
        path = self.path / "stages" / "dpo" / "metrics.jsonl"
        return [json.loads(line) for line in path.open()] if path.exists() else []


def prepare(data: Path) -> None:
    """A tiny base, pictures, and pairs with their reference values."""
    from families import save_family
    from training_case import pair_rows, store

    from insightv.training.config import ReferenceConfig
    from insightv.training.reference import Reference

    save_family("qwen2.5-vl", data / "base", layers=4)
    share(data / "base")  # the chain's user is another
    pictures, ids = store(data / "pictures")
    reference = Reference(data / "base", ReferenceConfig(precision="fp32"), pictures)

    async def refer() -> list[Any]:
        made = [await reference(str(n), {"pairs": [row]}) for n, row in enumerate(pair_rows(ids))]
        await reference.close()
        return [row for rows in made for row in rows]

    (data / "data.json").write_text(json.dumps({"pairs": asyncio.run(refer())}))


def expected(data: Path, place: Path) -> list[dict[str, Any]]:
    """The same by the torch backend, here."""
    from training_case import Here

    from insightv.models import digest_of
    from insightv.pictures import Pictures
    from insightv.training.trainer import train_dpo

    rows = json.loads((data / "data.json").read_text())["pairs"]
    here, pictures = Here(place / "stage"), Pictures([data / "pictures"])
    base = data / "base"
    train_dpo(training_chain.config(), base, rows, pictures, place / "m", here, digest_of(base))
    return here.lines()


@pytest.mark.full  # eight processes that import torch
@pytest.mark.timeout(2400)
def test_a_training_of_two_nodes_is_preempted_and_goes_on(cluster: Testbed, tmp_path: Path) -> None:
    folder = cluster.folder("training")
    prepare(folder / "data")
    asked = profile()
    asked.training = Resources(partition="low", memory="6G", minutes=60, nodes=2, tasks=2, grace=60)
    run = Training(cluster, asked, folder)
    run.submit()
    wait_for(lambda: len(run.losses()) >= 6, 1200, 1.0, run.say)
    words = ("sbatch", "-p", "high", "--exclusive", "-N", "4", "-t", "1", "--wrap", "sleep 10")
    cluster.run(*words, "--output=/dev/null")
    wait_for(lambda: any(entry["asked"] == "leave" for entry in run.ended("dpo")), say=run.say)
    before = len(run.losses())
    assert before < training_chain.STEPS
    run.wait(1200)
    found, wanted = run.losses(), expected(folder / "data", tmp_path)
    assert [line["step"] for line in found] == list(range(1, training_chain.STEPS + 1))
    for here, there in zip(found, wanted, strict=True):
        for name in ("loss", "grad_norm", "margin"):
            assert here[name] == pytest.approx(there[name], abs=1e-3), name
    assert [entry["restart"] for entry in run.ended("dpo")] == [0, 1]
    assert [entry["attempt"] for entry in run.submitted()] == [0] * len(run.submitted())
    alike(run.path / "models" / "dpo", tmp_path / "m")


def alike(one: Path, other: Path) -> None:
    import torch

    from insightv import models

    first, second = (
        dict(models.load(path, "cpu", "float32").model.named_parameters()) for path in (one, other)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-3, rtol=0, msg=name)
