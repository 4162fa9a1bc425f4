"""Workers, by killing, stopping and robbing them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import worked

from hpc import gates, mapping, reading
from hpc.errors import UserError
from hpc.frames import read_frames
from hpc.rundir import CANCELLED, Chain, RunDir
from hpc.shards import (
    join,
    part_path,
    read_errors,
    read_groups,
    read_rows,
    shard_path,
    sidecar_path,
    sidecars,
    verify,
)
from hpc.stages import Stage
from hpc.work import work


class Forked:
    """A true process, forked rather than started: many a test needs several at once."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1) for number in (1, 2))
            status = worked.main(words)
        finally:
            traceback.print_exc() if status == 1 and sys.exc_info()[0] else None
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, seconds: float = 90.0) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end, "still running"
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Team:
    """A run with a stage to do, and processes that do it."""

    def __init__(self, run: Path, count: int, per_shard: int) -> None:
        self.chain = worked.prepare(run, count, per_shard)
        self.run = self.chain.run
        self.count = count
        self.processes: list[Forked] = []

    def start(self, **options) -> Forked:
        words = [
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in options.items()
        ]
        log = self.run.path / f"log{len(self.processes)}"
        self.processes.append(Forked([str(self.run.path), *words], log))
        return self.processes[-1]

    def log(self, process) -> str:
        return (self.run.path / f"log{self.processes.index(process)}").read_text()

    def called(self) -> list[str]:
        path = self.run.stage_dir("count") / "called"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, condition, seconds=90.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.005)

    def check(self) -> list[str]:
        """All keys once, the right rows, nothing left over; the digests of the shards."""
        out = self.run.shards("count")
        found = Counter()
        for index in sidecars(self.run.shards("numbers")):
            path = shard_path(out, index)
            verify(path)
            source = [key for key, _ in read_groups(shard_path(self.run.shards("numbers"), index))]
            assert [key for key, _ in read_groups(path)] == source
            found.update(source)
        assert found == Counter({f"n:{n}": 1 for n in range(self.count)})
        multiples = [n for n in range(self.count) if n % 7 == 0]
        assert list(read_errors(out)) == [(f"n:{n}", "a multiple of 7") for n in multiples]
        expected = [
            (n, copy) for n in range(self.count) if n % 7 and n % 3 for copy in range(2 - n % 2)
        ]
        assert [(row["n"], row["copy"]) for row in read_rows(out)] == expected
        assert list(self.run.leases("count").iterdir()) == []
        left = [path for path in out.iterdir() if not path.name.startswith(".")]
        assert {path.suffix for path in left} == {".json", ".zst"}
        return [sidecar.sha256 for sidecar in sidecars(out).values()]

    def finish(self, **options) -> list[str]:
        process = self.start(**options)
        assert process.wait() == 0, self.log(process)
        return self.check()


@pytest.fixture
def team(tmp_path):
    teams = []

    def make(count=40, per_shard=8, name="run"):
        teams.append(Team(tmp_path / name, count, per_shard))
        return teams[-1]

    yield make
    for process in (process for made in teams for process in made.processes):
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def test_one_worker_and_the_same_bytes_from_four(team):
    one, four = team(120, 9, "one"), team(120, 9, "four")
    alone = one.finish(concurrency=1)
    assert len(one.called()) == 120
    workers = [four.start(pause=0.005, concurrency=5) for _ in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    assert four.check() == alone
    assert sorted(four.called()) == sorted(one.called()), "no input was worked on twice"


def test_nothing_to_do_loads_nothing(team):
    made = team()
    made.finish()
    loads = made.run.stage_dir("count") / "loads"
    before = loads.read_text()
    assert work(worked.make(made.run.path), "count") == 0
    assert loads.read_text() == before


def test_engine_stays_full_across_shard_ends(team):
    made = team(40, 2)
    made.finish(concurrency=8, pause=0.02)
    assert (made.run.stage_dir("count") / "most").read_text() == "8\n"


def test_killed_at_random_moments(team):
    straight, made = team(90, 12, "straight"), team(90, 12, "killed")
    digests = straight.finish()
    for seed in range(8):
        generator = random.Random(seed)
        made.start(pause=0.005)
        victim = made.start(kill_at_call=generator.randrange(1, 9), pause=0.003)
        time.sleep(generator.uniform(0.1, 0.6))
        for process in made.processes:
            process.kill()
        assert victim.wait() == -signal.SIGKILL or victim.returncode == 0
    assert made.finish() == digests


def test_what_was_flushed_is_not_done_again(team):
    made = team(30, 30)
    assert made.start(concurrency=1, kill_at_call=22, keys=2).wait() == -signal.SIGKILL
    before = len(made.called())
    assert before == 21
    made.finish(concurrency=1)
    assert len(made.called()) == 30 + before % 2, "only the open frame was lost"


def test_torn_frame_at_the_end_of_a_part(team):
    made = team(30, 30)
    made.start(concurrency=1, kill_at_call=22, keys=2).wait()
    part = part_path(made.run.shards("count"), 0, 0)
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) - 7])
    made.finish(concurrency=1)
    assert len(made.called()) == 21 + 9 + 1 + 2


@pytest.mark.parametrize("step", ["sidecar", "link"])
def test_killed_around_the_link(team, step):
    made = team(16, 8)
    assert made.start(kill_at=step).wait() == -signal.SIGKILL
    out = made.run.shards("count")
    linked = list(out.glob("*.jsonl.zst"))
    assert len(linked) == (step == "sidecar") and not sidecars(out)
    calls = made.called()
    made.finish()
    assert len(made.called()) == 16 + len(calls) - 8, "the finished shard was not made again"


def test_damaged_shard_without_sidecar_is_not_adopted(team):
    made = team(16, 16)
    assert made.start(kill_at="sidecar", keys=4).wait() == -signal.SIGKILL
    out = made.run.shards("count")
    path = shard_path(out, 0)
    for part in out.glob("*.part*"):
        part.unlink()
    with path.open("rb") as file:
        frames = list(read_frames(file, path))
    broken = bytearray(path.read_bytes())
    broken[frames[1].start + 30] ^= 4
    path.write_bytes(bytes(broken))
    made.finish()
    assert len(made.called()) == 16 + len(frames[1].entries)


@pytest.mark.parametrize("place", ["", "link:stop", "sidecar:stop"])
def test_stopped_robbed_and_continued(team, place):
    """One commit, whoever makes it; the robbed owner ends well."""
    made = team(12, 12)
    owner = made.start(ttl=0.6, pause=0.05, keys=1, concurrency=2, kill_at=place)
    if place:
        made.wait_for(lambda: stopped(owner))
    else:
        made.wait_for(lambda: len(made.called()) > 3)
        owner.send_signal(signal.SIGSTOP)
        made.wait_for(lambda: stopped(owner))
    robber = made.start(ttl=0.6)
    assert robber.wait() == 0, made.log(robber)
    out = made.run.shards("count")
    sidecar = sidecar_path(shard_path(out, 0)).read_text()
    inode = shard_path(out, 0).stat().st_ino
    owner.send_signal(signal.SIGCONT)
    assert owner.wait() == 0, made.log(owner)
    assert shard_path(out, 0).stat().st_ino == inode
    if place != "sidecar:stop":
        assert sidecar_path(shard_path(out, 0)).read_text() == sidecar
        assert json.loads(sidecar)["generation"] == 1
    made.check()
    if not place:
        assert max(Counter(made.called()).values()) <= 2


def stopped(process) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_robbed_while_the_robber_is_at_work(team):
    """Both work on the same shard for a while; the slow one drops it."""
    made = team(20, 20)
    owner = made.start(ttl=0.5, pause=0.05, keys=1)
    made.wait_for(lambda: len(made.called()) > 3)
    owner.send_signal(signal.SIGSTOP)
    robber = made.start(ttl=0.5, pause=0.1)
    made.wait_for(lambda: part_path(made.run.shards("count"), 0, 1).exists())
    owner.send_signal(signal.SIGCONT)
    assert owner.wait() == robber.wait() == 0
    made.check()


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGUSR1], 75),
        ([signal.SIGUSR2, signal.SIGUSR1], 75),
        ([signal.SIGTERM], 143),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1], 143),
        ([signal.SIGINT, signal.SIGTERM], 130),
        ([signal.SIGUSR1, signal.SIGTERM], 143),
    ],
)
def test_signals_flush_release_and_leave(team, numbers, status):
    made = team(60, 60)
    worker = made.start(pause=0.02, keys=1000, hang_close=len(numbers) > 1)
    made.wait_for(lambda: len(made.called()) >= 10)
    for number in numbers:
        worker.send_signal(number)
    assert worker.wait() == status, made.log(worker)
    done = len(made.called())
    assert done < 60
    (lease,) = made.run.leases("count").iterdir()
    assert json.loads(lease.read_text())["released"] is True
    assert not list(made.run.progress("count").iterdir())
    started = time.monotonic()
    made.finish()
    assert time.monotonic() - started < 50, "a released lease is free at once"
    assert len(made.called()) == 60


def test_cancelled(team):
    made = team(60, 60)
    worker = made.start(pause=0.05)
    made.wait_for(lambda: len(made.called()) >= 5)
    made.run.mark(CANCELLED, "by hand")
    assert worker.wait() == 77
    idle = made.start()
    assert idle.wait() == 77
    made.run.unmark(CANCELLED)
    made.finish()
    assert len(made.called()) == 60


def test_failures_of_the_mapper(team):
    made = team(30, 10)
    crashed = made.start(crash_at="n:15", concurrency=1)
    assert crashed.wait() == 1
    log = made.log(crashed)
    assert "Traceback" in log and "out of luck" in log and "input 'n:15'" in log
    user = made.start(user_error_at="n:15", concurrency=1)
    assert user.wait() == 2
    assert made.log(user) == "error: n:15: mend it\n"
    assert made.start(load_error="user").wait() == 2
    started = time.monotonic()
    made.finish()
    assert time.monotonic() - started < 50, "leases were released"
    assert len(made.called()) == 30, "what was done before a failure was kept"


def test_hung_engine_is_robbed_and_ends_itself(team):
    made = team(4, 4)
    hung = made.start(hang_at="n:3", stall=3.0, ttl=0.6, dead=False, concurrency=1)
    made.wait_for(lambda: "n:2" in made.called())
    helper = made.start(ttl=0.6, dead=False)
    made.wait_for(lambda: made.called().count("n:3"))
    assert hung.poll() is None, "robbed while it hung"
    assert helper.wait() == 0
    made.check()
    assert hung.wait() == 1
    assert "giving up" in made.log(hung)


def test_idle_worker_waits_for_others_or_leaves_it_to_them(team):
    made = team(4, 4)
    owner = made.start(pause=3600, ttl=3.0)
    loads = made.run.stage_dir("count") / "loads"
    made.wait_for(loads.exists)
    spare = made.start(ttl=3.0, linger=0.0)
    assert spare.wait() == gates.SPARE and owner.poll() is None
    patient = made.start()
    time.sleep(0.3)
    assert patient.poll() is None
    owner.kill()
    assert patient.wait() == 0
    made.check()
    assert loads.read_text().split() == [str(owner.pid), str(patient.pid)]


def test_idle_worker_stays_where_an_owner_may_be_dead(team):
    made = team(8, 4)
    owner = made.start(pause=3600, ttl=1.0)
    other = made.start(pause=3600, ttl=1.0)
    made.wait_for(lambda: len(list(made.run.leases("count").glob("*"))) == 2)
    owner.send_signal(signal.SIGSTOP)
    spare = made.start(ttl=1.0, linger=0.0, dead=False)
    made.wait_for(lambda: len(made.called()) >= 4)  # it took the shard over
    assert spare.wait() == gates.SPARE
    other.kill()
    owner.kill()
    assert made.start().wait() == 0
    made.check()


def test_many_workers_at_once(team):
    made = team(192, 2)
    workers = [made.start(pause=0.002, linger=0.0) for _ in range(10)]
    ends = {worker.wait() for worker in workers}
    assert 0 in ends and ends <= {0, gates.SPARE}
    made.check()
    assert max(Counter(made.called()).values()) == 1


def test_a_shard_costs_no_listing_and_no_look_at_the_others(team, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    made = team(300, 1)
    looks = Counter()

    def counted(module, name):
        plain = getattr(module, name)

        def counting(path, *more):
            looks[f"{name} {path.parent.name if path.is_dir() else 'file'}"] += 1
            return plain(path, *more)

        monkeypatch.setattr(module, name, counting)

    counted(mapping, "list_folder")
    counted(reading, "read_sidecar")
    assert work(made.chain, "count") == 0
    assert looks["list_folder numbers"] == 1
    assert looks["list_folder count"] <= 300 / 32 + 3  # and the sweep at the end
    assert looks["read_sidecar file"] == 300
    made.check()


def test_shards_others_finished_are_passed_over(team, monkeypatch):
    """A worker's memory of a listing may be as old as it likes."""
    made = team(120, 1)
    plain = mapping.list_folder

    def list_then_lose(folder):
        found = plain(folder)
        if folder == made.run.shards("count"):
            monkeypatch.setattr(mapping, "list_folder", plain)
            assert made.start().wait() == 0
        return found

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(mapping, "list_folder", list_then_lose)
    assert work(made.chain, "count") == 0
    made.check()
    assert max(Counter(made.called()).values()) == 1


def test_input_damaged_or_missing(team):
    made = team(12, 4)
    path = shard_path(made.run.shards("numbers"), 1)
    broken = bytearray(path.read_bytes())
    broken[20] ^= 1
    path.write_bytes(bytes(broken))
    worker = made.start()
    assert worker.wait() == 2
    (line,) = made.log(worker).splitlines()
    assert str(path) in line and "byte 0" in line
    sidecar_path(path).unlink()
    with pytest.raises(UserError, match="00001.*not complete"):
        work(worked.make(made.run.path), "count")
    with pytest.raises(UserError, match="no stage 'cuont'.*count"):
        work(made.chain, "cuont")
    with pytest.raises(UserError, match="no shards"):
        work(worked.make(made.run.path / "other"), "count")


def test_unfinished_work_of_other_inputs_is_refused(team):
    made = team(6, 6)
    made.start(concurrency=1, kill_at_call=5).wait()
    worked.write_groups(made.run.shards("numbers"), ((f"m:{n}", [{"n": n}]) for n in range(6)))
    worker = made.start()
    assert worker.wait() == 2
    assert "key 'n:0', which its input lacks" in made.log(worker)


def test_full_disk_stops_with_one_line_and_loses_nothing(team):
    made = team(400, 400)
    program = (
        "import resource, signal, sys, runpy; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000));"
        f"sys.argv = ['worked.py', {str(made.run.path)!r}, 'keys=1'];"
        f"runpy.run_path({worked.__file__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "free some space" in done.stderr
    first = len(made.called())
    made.finish()
    assert len(made.called()) <= 400 + 4 and first > 10


def test_side_inputs_are_joined(tmp_path):
    seen = {}

    class Look:
        concurrency = 2

        async def __call__(self, key, inputs):
            seen[key] = inputs
            return [{"key": key}]

        async def close(self):
            pass

    stages = [
        Stage("numbers", "job", run=lambda context: None),
        Stage("names", "job", run=lambda context: None),
        Stage("look", "map", {"a": "numbers", "b": "names"}, load=lambda context: Look()),
    ]
    run = RunDir(tmp_path)
    chain = Chain(stages, run, ["x"])
    worked.write_groups(run.shards("numbers"), ((str(n), [{"n": n}]) for n in range(5)), 2)
    worked.write_groups(run.shards("names"), ((str(n), []) for n in range(4)), 2)
    with pytest.raises(UserError, match="stages/names/shards/00002|lacks key '4'"):
        work(chain, "look")
    worked.write_groups(run.shards("names"), ((str(n), [{"s": str(n)}] * n) for n in range(5)), 2)
    assert work(chain, "look") == 0
    assert seen["4"] == {"a": [{"n": 4}], "b": [{"s": "4"}] * 4} and len(seen) == 5
    assert len(list(join({"look": run.shards("look"), "a": run.shards("numbers")}))) == 5


def test_job(tmp_path):
    told = []

    def run(context):
        for step in range(3):
            context.progress(step + 1, 3, loss=0.5)
        told.extend(
            json.loads(path.read_text()) for path in (context.directory / "progress").iterdir()
        )
        if (context.run / "stop").exists():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert context.stopping()
            return None
        if (context.run / "crash").exists():
            raise RuntimeError("boom")
        assert not context.stopping()
        with pytest.raises(UserError, match="no input 'b'; it has: a"):
            context.shards("b")
        assert context.shards("a") == context.run / "stages" / "first" / "shards"
        return {"kept": 3}

    stages = [
        Stage("first", "job", run=lambda context: None),
        Stage("second", "job", {"a": "first"}, run=run),
    ]
    chain = Chain(stages, RunDir(tmp_path), ["x"])
    counts = chain.run.counts("second")
    assert work(chain, "first") == 0 and json.loads(chain.run.counts("first").read_text()) == {}
    assert work(chain, "second") == 0
    assert json.loads(counts.read_text()) == {"kept": 3}
    assert [(entry["done"], entry["total"], entry["numbers"]) for entry in told] == [
        (3, 3, {"loss": 0.5})
    ]
    (tmp_path / "stop").touch()
    before = signal.getsignal(signal.SIGUSR1)
    assert work(chain, "second") == 75 and not counts.exists()
    assert signal.getsignal(signal.SIGUSR1) == before
    (tmp_path / "stop").unlink()
    (tmp_path / "crash").touch()
    assert work(chain, "second") == 1 and not counts.exists()
    chain.run.mark(CANCELLED)
    assert work(chain, "second") == 77


def test_ranks_of_a_job(tmp_path, monkeypatch):
    """The first is heard; one that leaves because another was asked is queued again."""
    found: list = [{"kept": 3}]

    def run(context):
        context.progress(1, 2)
        assert context.lead == bool(list((context.directory / "progress").iterdir()))
        context.hush()
        return found[0]

    stage = Stage("only", "job", run=run, distributed=True)
    chain = Chain([stage], RunDir(tmp_path), ["x"])
    counts = chain.run.counts("only")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert work(chain, "only") == 0
        assert counts.exists() == (rank == "0")
    found[0] = None
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert work(chain, "only") == 75
    assert not counts.exists()


def test_a_job_that_meets_a_full_disk(tmp_path):
    def run(context):
        Path("/dev/full").write_text("rows")

    chain = Chain([Stage("only", "job", run=run)], RunDir(tmp_path), ["x"])
    with pytest.raises(UserError, match=rf"{tmp_path}: cannot write .*free some space"):
        work(chain, "only")
    assert not chain.run.counts("only").exists()
