"""A step, planned by several ranks together: nothing twice, nothing lost, little prepared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from training_case import loaded, sample_rows, store

from hpc.errors import UserError
from insightv.training.batches import Encoder, Rows
from insightv.training.config import SFTConfig
from insightv.training.loading import Loader, Measure, Step
from insightv.training.packing import Packer
from insightv.training.ranks import Ranks


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, count: int, values: list[Any], barrier: threading.Barrier):
        super().__init__()
        self.rank, self.count, self._values, self._barrier = rank, count, values, barrier

    def every(self, work: Callable[[], Any]) -> list[Any]:
        try:
            self._values[self.rank] = work()
        except BaseException:
            self._barrier.abort()
            raise
        self._barrier.wait(60)
        found = list(self._values)
        self._barrier.wait(60)
        return found


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    pictures, ids = store(folder / "pictures")
    model = loaded("llava")
    data = sample_rows([*ids[:3], "f" * 64], 12)  # one of the pictures is not there
    data += [row | {"key": f"{row['key']}/again"} for row in data[1::3]]
    encoder = Encoder(model.processor, pictures, 100, 64)
    packer = Packer(model.model, 0, 150)
    return Rows(data, folder), encoder, packer


def loads(case, count: int, copies: int, step: int, share: bool) -> list[tuple[Step, list[str]]]:
    """The step that each rank prepares, and the keys that it encoded for that."""
    rows, encoder, packer = case
    config = SFTConfig(batch_size=9, epochs=3, seed=5, share_pictures=share)
    values, barrier = [None] * count, threading.Barrier(count)

    def one(rank: int) -> tuple[Step, list[str]]:
        seen: list[str] = []

        def encode(row):
            seen.append(row["key"])
            return encoder.sample(row)

        ranks = Threads(rank, count, values, barrier)
        copy = rank // (count // copies)
        return Loader(config, rows, encode, packer, ranks, copies, copy)(step), seen

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


@pytest.mark.parametrize("number", [0, 1])  # the second has samples of two epochs, some twice
@pytest.mark.parametrize(("count", "copies"), [(2, 2), (4, 2), (4, 1), (12, 12)])
@pytest.mark.parametrize("share", [False, True])
def test_ranks_share_a_step(case, count, copies, number, share):
    ((whole, _),) = loads(case, 1, 1, number, share)
    assert whole.dropped and whole.totals.samples == samples(whole) <= 9 - len(whole.dropped)
    assert (len(whole.trees) < samples(whole)) == share
    largest = max(len(tree.samples) for tree in whole.trees)
    each = count // copies
    made = loads(case, count, copies, number, share)
    assert [step.dropped for step, _ in made] == [whole.dropped] * count
    keys: list[str] = []
    for copy in range(copies):
        (step, _), *rest = made[copy * each : (copy + 1) * each]
        own = [[batch.keys for batch in step.batches]] * (each - 1)
        assert [[batch.keys for batch in other.batches] for other, _ in rest] == own
        keys += [key for tree in step.trees for key in tree.keys]
        assert sorted(key for batch in step.batches for key in batch.keys) == sorted(
            key for tree in step.trees for key in tree.keys
        )
    assert sorted(keys) == sorted(key for tree in whole.trees for key in tree.keys)
    assert len({len(step.batches) for step, _ in made}) == 1
    assert {step.most for step, _ in made} == {max(samples(step) for step, _ in made)}
    assert {step.flops for step, _ in made} == {whole.flops} != {0.0}
    for step, seen in made:
        for name in ("samples", "target_tokens", "tokens", "unshared"):
            assert getattr(step.totals, name) == getattr(whole.totals, name)
        assert step.totals.places >= step.totals.tokens
        # What a rank measured for all, what its copy trains on, and one sample to idle through.
        idle = any(not batch.keys for batch in step.batches)
        measured = -(-(9 if not share else len(whole.trees) + 1) // count) * largest
        assert len(seen) <= measured + largest * (len(step.trees) + idle)


def samples(step: Step) -> int:
    return sum(len(tree.samples) for tree in step.trees)


def test_a_step_of_which_nothing_is_left(case):
    rows, encoder, packer = case
    config = SFTConfig(batch_size=2)
    strict = Encoder(encoder.processor, encoder._picture._pictures, 5, 1)
    step = Loader(config, rows, strict.sample, packer, Ranks(), 1, 0)(0)
    assert not step.batches and len(step.dropped) == 2 and step.totals.samples == 0


def test_a_sample_that_one_rank_cannot_read_again(case):
    rows, encoder, packer = case
    first: list[int] = []

    def encode(row):
        from hpc.errors import RecordError

        if first and threading.get_ident() != first[0]:
            raise RecordError("it is gone")
        return encoder.sample(row)

    loader = Loader(SFTConfig(), rows, encode, packer, Ranks(), 1, 0)
    first.append(-1)
    with pytest.raises(UserError, match="by one process and not by another .*it is gone"):
        loader._again(Measure("k", 0, 0, 1, 1.0, 1), [0], {})
