"""Leases: one owner at a time, taken over from the dead and the silent only."""

import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc.errors import UserError
from hpc.leases import Lease, Leases, LostLease, Owner, gone, lease_path


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Clock:
    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now


def observer(folder, clock=None, dead=None):
    return Leases(
        folder,
        Owner.here(),
        ttl=60,
        dead=dead or (lambda owner: False),
        clock=clock or Clock(random.uniform(0, 1e9)),
    )


def test_claims_each_once(tmp_path):
    leases = observer(tmp_path)
    held = [leases.claim(dict.fromkeys(range(5), 0)) for _ in range(5)]
    assert sorted(lease.index for lease in held) == list(range(5))
    assert leases.claim(dict.fromkeys(range(5), 0)) is None
    assert sorted(leases.owners()) == list(range(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0000{n}.0" for n in range(5)]


def test_silent_owner_is_robbed_after_the_ttl_of_the_observers_clock(tmp_path):
    owner = observer(tmp_path).claim({7: 0})
    clock = Clock(-5e8)
    other = observer(tmp_path, clock)
    assert other.claim({7: 0}) is None
    clock.now += 59
    assert other.claim({7: 0}) is None
    owner.beat()
    clock.now += 59
    assert other.claim({7: 0}) is None, "the counter moved"
    clock.now += 59
    assert other.claim({7: 0}) is None
    clock.now += 2
    lease = other.claim({7: 0})
    assert lease is not None and lease.generation == 1
    for _ in range(2):
        with pytest.raises(LostLease):
            owner.beat()
    owner.release()
    lease.beat()
    assert [path.name for path in tmp_path.iterdir()] == ["00007.1"]


def test_a_fresh_observer_gives_everyone_the_whole_ttl(tmp_path):
    """However old a file is: what counts is what this observer saw."""
    observer(tmp_path).claim({0: 0})
    os.utime(tmp_path / "00000.0", (0, 0))
    clock = Clock()
    other = observer(tmp_path, clock)
    assert other.claim({0: 0}) is None
    clock.now += 59.9
    assert other.claim({0: 0}) is None


def test_half_written_lease_is_held_until_it_is_stale(tmp_path):
    (tmp_path / "00000.4").write_bytes(b"")
    clock = Clock()
    other = observer(tmp_path, clock)
    assert other.claim({0: 0}) is None and other.owners() == {}
    clock.now += 60
    assert other.claim({0: 0}).generation == 5


def test_released_lease_is_free_at_once_under_the_next_generation(tmp_path):
    lease = observer(tmp_path).claim({0: 0})
    lease.release()
    with pytest.raises(LostLease):
        lease.beat()
    assert observer(tmp_path).claim({0: 0}).generation == 1


def test_floor_of_generations(tmp_path):
    assert observer(tmp_path).claim({0: 3}).generation == 3
    clock = Clock()
    other = observer(tmp_path, clock)
    other.claim({0: 9})
    clock.now += 60
    assert other.claim({0: 9}).generation == 9


def test_dropped_lease_leaves_nothing(tmp_path):
    lease = observer(tmp_path).claim({0: 2})
    lease_path(tmp_path, 0, 1).touch()
    lease.drop()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LostLease):
        lease.beat()


def test_claim_on_an_old_look_gives_way_to_a_later_generation(tmp_path, monkeypatch):
    clock = Clock()
    other = observer(tmp_path, clock)
    observer(tmp_path).claim({0: 0})
    other.claim({0: 0})
    clock.now += 60
    stale = other._stale

    def slow(index, generation):
        found = stale(index, generation)
        # Meanwhile two others have had the shard, and the second one is at work.
        (tmp_path / "00000.0").unlink()
        Lease(tmp_path, 0, 2, Owner.here())
        return found

    monkeypatch.setattr(other, "_stale", slow)
    assert other.claim({0: 0}) is None
    assert [path.name for path in tmp_path.iterdir()] == ["00000.2"]


def test_removed_folder_loses_the_lease(tmp_path):
    lease = observer(tmp_path / "leases").claim({0: 0})
    (tmp_path / "leases").rename(tmp_path / "removed")
    with pytest.raises(LostLease):
        lease.check()


def test_gone_is_told_of_this_kernels_processes_only():
    here = Owner.here(job="7")
    assert not gone(here)
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    child = Owner.here()
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    child = replace(child, pid=pid, started=started)
    assert not gone(child)
    assert gone(replace(child, started=started - 1)), "another process has the number now"
    os.kill(pid, signal.SIGKILL)
    while not gone(child):
        time.sleep(0.01)  # a zombie by now: nobody has waited for it
    assert os.waitpid(pid, os.WNOHANG)[0] == pid
    assert gone(child)
    assert not gone(replace(child, place="another kernel"))
    assert not gone(replace(child, place=""))


def test_owner_known_dead_is_succeeded_at_once(tmp_path):
    observer(tmp_path).claim({0: 0})
    asked = []

    def dead(owner):
        asked.append(owner)
        return owner.job == "gone"

    other = observer(tmp_path, dead=dead)
    assert other.claim({0: 0}) is None
    assert asked[0].pid == os.getpid() and asked[0].host
    Lease(tmp_path, 1, 0, Owner.here(job="gone"))
    assert other.claim({0: 0, 1: 0}).index == 1


def test_processes_never_claim_twice(tmp_path):
    """Eight processes with several threads each, all after the same shards at once."""
    count = 60
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                leases = observer(tmp_path / "leases")
                free = dict.fromkeys(range(count), 0)
                won = []

                def work(leases=leases, free=free, won=won):
                    while (lease := leases.claim(free)) is not None:
                        won.append(lease.index)

                threads = [threading.Thread(target=work) for _ in range(4)]
                [thread.start() for thread in threads]
                [thread.join() for thread in threads]
                (tmp_path / f"won{os.getpid()}").write_text(" ".join(map(str, won)))
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    won = [int(n) for path in tmp_path.glob("won*") for n in path.read_text().split()]
    assert Counter(won) == Counter(range(count))


actions = st.lists(
    st.tuples(
        st.sampled_from(["claim", "beat", "release", "pass", "commit"]),
        st.integers(0, 2),
        st.integers(0, 1),
    ),
    max_size=40,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=actions)
def test_any_history_has_one_valid_owner_a_shard(tmp_path_factory, steps):
    """Three observers with clocks of their own; at most one lease of a shard checks out."""
    folder = tmp_path_factory.mktemp("leases")
    clocks = [Clock(n * 1e6) for n in range(3)]
    observers = [observer(folder, clock) for clock in clocks]
    held: list[dict[int, Lease]] = [{}, {}, {}]
    generations: dict[int, int] = {}
    for action, who, shard in steps:
        lease = held[who].get(shard)
        if action == "claim":
            wanted = {n: 0 for n in (0, 1) if n not in held[who]}
            if made := observers[who].claim(wanted):
                assert made.generation > generations.get(made.index, -1)
                generations[made.index] = made.generation
                held[who][made.index] = made
        elif action == "pass":
            for clock in clocks:
                clock.now += 25
        elif lease is not None:
            try:
                if action == "beat":
                    lease.beat()
                    continue
                lease.check()
                if action == "release":
                    lease.release()
                else:
                    lease.drop()
                    generations.pop(shard)
            except LostLease:
                lease.close()
            del held[who][shard]
        for index in (0, 1):
            valid = 0
            for mine in held:
                if index in mine:
                    try:
                        mine[index].check()
                        valid += 1
                    except LostLease:
                        pass
            assert valid <= 1
    for mine in held:
        for lease in mine.values():
            lease.close()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        observer(tmp_path / "file")


def test_scanning_thousands_is_cheap(tmp_path, monkeypatch):
    """One listing, no file opened but the lease's own, when something is free."""
    for index in range(3000):
        (tmp_path / f"{index:05d}.0").touch()
    leases = observer(tmp_path)
    reads = []
    monkeypatch.setattr("hpc.leases._read", lambda path: reads.append(path))
    assert leases.claim(dict.fromkeys(range(3001), 0)).index == 3000
    assert reads == []
