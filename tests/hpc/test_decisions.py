"""A stage that a decision lets pass: without work, and without harm to what stands behind it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import counting
import pytest

from hpc import gates
from hpc.control import gate
from hpc.errors import UserError
from hpc.rundir import Chain
from hpc.stages import Stage
from hpc.status import board, status

SLOW = ("n=40", "per_shard=4", "pause=0.5", "only=more", "slots=3")


def states(chain: Chain) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in status(chain)["stages"]}


def test_a_decision_ends_what_is_at_work_and_lets_pass_what_waits(tmp_path: Path) -> None:
    chain = counting.run(tmp_path / "run", (*SLOW, "enough=doubles do"))
    found = status(chain)
    assert found["state"] == "complete"
    assert states(chain) == {
        "numbers": "complete",
        "double": "complete",
        "decide": "complete",
        "more": "skipped",
        "sum": "skipped",
        "told": "complete",
    }
    reasons = {stage["reason"] for stage in found["stages"] if stage["state"] == "skipped"}
    assert reasons == {"decide: doubles do"}
    assert (chain.run.read_manifest("told") or {})["counts"] == {"sums": 0}
    # It took twenty half seconds of two calls each of two workers, had it not been ended.
    assert (chain.run.read_manifest("more") or {})["seconds"] < 4
    assert "skipped by decide: doubles do" in str(board(found).caption)


def test_a_decision_to_go_on_changes_nothing(tmp_path: Path) -> None:
    chain = counting.run(tmp_path / "run", ("enough=not",))
    assert set(states(chain).values()) == {"complete"}
    assert (chain.run.read_manifest("told") or {})["counts"] == {"sums": 1}


def test_another_decision_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    counting.run(path, ("enough=doubles do",))
    made = {name: counting.open_chain(path).run.manifest(name).stat() for name in ("double",)}
    with pytest.raises(UserError, match="doubles do"):
        counting.run(path, ("enough=not",))
    chain = counting.run(path, ("enough=not",), remake=True)
    assert set(states(chain).values()) == {"complete"}
    assert (chain.run.read_manifest("told") or {})["counts"] == {"sums": 1}
    assert chain.run.manifest("double").stat().st_mtime == made["double"].st_mtime
    chain = counting.run(path, ("enough=now they do",), remake=True)
    # What was complete stays; what waits for the decision follows it.
    assert states(chain)["more"] == "complete"
    assert states(chain)["sum"] == "skipped"
    assert not (path / "models" / "sum").exists()
    assert (chain.run.read_manifest("told") or {})["counts"] == {"sums": 0}


def test_gates_pass_at_once_and_tell_which_jobs_nobody_needs(tmp_path: Path) -> None:
    path = tmp_path / "run"
    counting.run(path, ("enough=doubles do",))
    chain = counting.open_chain(path)
    (path / "cluster.yaml").write_text("partition: batch\n")
    for name in ("more", "sum", "told"):
        chain.run.remove(name)
    assert gate(chain, "decide", 0, 0) == gates.DONE
    assert (path / "slurm" / "passed-decide").read_text().split() == ["more", "sum"]
    # Taken out of the queue, the stages' gates come in any order, before their parents', too.
    assert gate(chain, "sum", 0, 0) == gates.DONE
    assert gate(chain, "more", 0, 0) == gates.DONE
    assert not chain.run.started("sum").exists()
    assert gates.fresh(chain, "sum") and gates.fresh(chain, "more")
    assert chain.run.started("told").exists()


def test_what_needs_no_job_gets_none(tmp_path: Path) -> None:
    path = tmp_path / "run"
    counting.run(path, ("enough=doubles do",))
    chain = counting.open_chain(path)
    for name in ("more", "sum"):
        chain.run.remove(name)
    gates.pass_over(chain)
    assert gates.fresh(chain, "more") and gates.fresh(chain, "sum")
    assert (chain.run.read_manifest("told") or {})["parents"] != chain.made("told")


def test_who_reads_what_may_pass_must_pass_with_it(tmp_path: Path) -> None:
    chain = counting.open_chain(tmp_path / "run", ("enough=not",))
    stages = {**chain.stages, "sum": dataclasses.replace(chain.stages["sum"], unless=())}
    with pytest.raises(UserError, match="sum: reads more, which decide may pass over"):
        Chain(stages, chain.run, chain.command)
    mapped = dataclasses.replace(chain.stages["sum"], unless=("double",), inputs={})
    with pytest.raises(UserError, match="only a job can"):
        Chain({**chain.stages, "sum": mapped}, chain.run, chain.command)
    circle = dataclasses.replace(chain.stages["decide"], after=("told",))
    with pytest.raises(UserError, match="wait for each other"):
        Chain({**chain.stages, "decide": circle}, chain.run, chain.command)


def test_decisions_shape_no_identity(tmp_path: Path) -> None:
    chain = counting.open_chain(tmp_path / "run", ("enough=not",))
    free = dataclasses.replace(chain.stages["more"], unless=())
    other = Chain([chain.stages["numbers"], free], chain.run, chain.command)
    assert isinstance(free, Stage)
    assert chain.identity("more") == other.identity("more")
