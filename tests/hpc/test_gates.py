from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hpc import gates
from hpc.errors import UserError
from hpc.rundir import STOPPED, Chain, RunDir
from hpc.shards import ShardWriter, shard_path, sidecar_path, write_groups
from hpc.stages import Stage


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_SECOND_LOOK", 0.0)


def unused(context: Any) -> Any:
    raise AssertionError("gates call no payload")


def make_chain(run: Path, limit: float = 0.0, **config: Any) -> Chain:
    """source (job, 3 shards of 4 keys) → copy (map) → model (job with an output)."""
    stages = [
        Stage("source", "job", run=unused),
        Stage("copy", "map", {"in": "source"}, config=config, load=unused, error_limit=limit),
        Stage("model", "job", {"in": "copy"}, run=unused, outputs=("models/m",)),
    ]
    return Chain(stages, RunDir(run), ["program"])


def do_source(chain: Chain) -> None:
    gates.prepare(chain, "source")
    groups = [(f"k{i}", [{"value": i}]) for i in range(12)]
    write_groups(chain.run.shards("source"), groups, per_shard=4)
    chain.run.counts("source").write_text(json.dumps({"made": 12}))


def do_copy(chain: Chain, indices: Iterable[int] = range(3), failing: tuple[int, ...] = ()) -> None:
    gates.prepare(chain, "copy")
    for index in indices:
        writer = ShardWriter(chain.run.shards("copy"), index)
        for i in range(4 * index, 4 * index + 4):
            if i in failing:
                writer.add(f"k{i}", [], f"no good: {i % 2}")
            else:
                writer.add(f"k{i}", [{"value": i}, {"value": -i}])
        writer.commit()


def do_model(chain: Chain) -> None:
    gates.prepare(chain, "model")
    (chain.run.models / "m").mkdir(parents=True)
    (chain.run.models / "m" / "weights").write_text("1")
    chain.run.counts("model").write_text("{}")


def do_all(chain: Chain) -> None:
    for name, do in {"source": do_source, "copy": do_copy, "model": do_model}.items():
        do(chain)
        assert gates.check(chain, name) == gates.DONE


def test_manifest_sums_up(tmp_path: Path) -> None:
    chain = make_chain(tmp_path, limit=0.2, n=1)
    do_source(chain)
    assert gates.check(chain, "source") == 0
    do_copy(chain, failing=(3, 5))
    assert gates.check(chain, "copy") == 0
    source, copy = chain.run.read_manifest("source"), chain.run.read_manifest("copy")
    assert source and copy
    assert (source["shards"], source["inputs"], source["rows"]) == (3, 12, 12)
    assert source["counts"] == {"made": 12}
    assert (copy["shards"], copy["inputs"], copy["rows"], copy["errors"]) == (3, 12, 20, 2)
    assert copy["parents"] == {"source": source["made"]} and copy["config"] == {"n": 1}
    assert gates.fresh(chain, "copy")


def test_missing_shards_are_named_and_asked_for_again(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    do_source(chain)
    gates.check(chain, "source")
    do_copy(chain, [0, 2])
    assert gates.missing(chain, "copy") == [1]
    assert gates.check(chain, "copy") == gates.RETRY
    assert json.loads(chain.run.missing("copy").read_text())["shards"] == [1]
    assert "00001" in gates.describe_missing(chain, "copy")
    assert not chain.run.manifest("copy").exists()
    do_copy(chain, [1])
    assert gates.check(chain, "copy") == gates.DONE
    assert not chain.run.missing("copy").exists()


def test_a_sidecar_without_its_shard_marks_nothing(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    do_all(chain)
    shard = shard_path(chain.run.shards("copy"), 2)
    shard.unlink()
    assert not gates.fresh(chain, "copy")
    chain.run.manifest("copy").unlink()
    assert gates.check(chain, "copy") == gates.RETRY
    assert not sidecar_path(shard).exists()  # a worker will make it again


def test_too_many_errors_stop_the_chain_with_their_reasons(tmp_path: Path) -> None:
    chain = make_chain(tmp_path, limit=0.1)
    do_source(chain)
    gates.check(chain, "source")
    do_copy(chain, failing=(1, 3, 4))
    assert gates.check(chain, "copy") == gates.STOP
    reason = chain.run.marked(STOPPED)
    assert reason and "3 of 12" in reason and "2 × no good: 1; 1 × no good: 0" in reason
    assert not chain.run.manifest("copy").exists()
    # A new start tries the shards that hold failures again, and only those.
    gates.prepare(chain, "copy")
    assert gates.missing(chain, "copy") == [0, 1]


def test_a_shard_with_other_keys_stops_the_chain(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    do_source(chain)
    gates.check(chain, "source")
    do_copy(chain, [0, 1])
    writer = ShardWriter(chain.run.shards("copy"), 2)
    writer.add("stranger", [])
    writer.commit()
    assert gates.check(chain, "copy") == gates.STOP
    assert "00002" in (chain.run.marked(STOPPED) or "")


def test_outputs_are_part_of_completion(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    do_all(chain)
    assert all(gates.standing(chain).values())
    (chain.run.models / "m" / "weights").unlink()  # an emptied folder is no model
    assert gates.standing(chain) == {"source": True, "copy": True, "model": False}
    chain.run.manifest("model").unlink()
    assert gates.check(chain, "model") == gates.RETRY
    assert "models/m" in gates.describe_missing(chain, "model")


def test_a_remade_stage_outdates_what_depends_on_it(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    do_all(chain)
    chain.run.remove("copy")
    assert gates.standing(chain) == {"source": True, "copy": False, "model": False}
    do_copy(chain)
    assert gates.check(chain, "copy") == gates.DONE
    assert gates.standing(chain) == {"source": True, "copy": True, "model": False}
    gates.prepare(chain, "model")  # its former output goes, for it was made from the former copy
    assert not (chain.run.models / "m").exists() and not chain.run.counts("model").exists()


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    do_all(make_chain(tmp_path, n=1, deep={"a": 1, "b": 2}))
    gates.refuse_changes(make_chain(tmp_path, n=1, deep={"a": 1, "b": 2}))
    with pytest.raises(UserError, match=r"stage copy .*deep\.b: 2 → 3.*another run dir.*--remake"):
        gates.refuse_changes(make_chain(tmp_path, n=1, deep={"a": 1, "b": 3}))


def test_unfinished_work_of_another_configuration_is_not_mixed_in(tmp_path: Path) -> None:
    chain = make_chain(tmp_path, n=1)
    do_source(chain)
    gates.check(chain, "source")
    gates.prepare(chain, "copy")
    gates.refuse_changes(make_chain(tmp_path, n=2))  # nothing finished: nothing to lose
    do_copy(chain, [0])
    other = make_chain(tmp_path, n=2)
    with pytest.raises(UserError, match="n: 1 → 2"):
        gates.refuse_changes(other)
    gates.prepare(other, "copy")
    assert gates.missing(other, "copy") == [0, 1, 2]


def test_interrupted_work_is_kept(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    do_source(chain)
    gates.check(chain, "source")
    do_copy(chain, [0])
    gates.prepare(chain, "copy")
    assert gates.missing(chain, "copy") == [1, 2]


def test_a_map_needs_its_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source is not complete"):
        gates.check(make_chain(tmp_path), "copy")


def test_gates_prepare_one_stage_at_once(tmp_path: Path) -> None:
    """Two parents' gates do; the folder is there for both, and what is stale is gone."""
    chain = make_chain(tmp_path / "run")
    for _ in range(10):
        do_source(chain)
        assert gates.check(chain, "source") == gates.DONE
        gates.make_folder(chain.run.logs("copy"))  # as a submission does
        stale = chain.run.stage_dir("copy") / "stale"
        stale.touch()
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(gates.prepare, chain, "copy") for _ in range(4)]:
                done.result()
        run = chain.run
        for folder in (run.shards("copy"), run.leases("copy"), run.logs("copy")):
            assert folder.is_dir()
        assert json.loads(run.started("copy").read_text())["parents"] == chain.made("copy")
        assert not stale.exists()
