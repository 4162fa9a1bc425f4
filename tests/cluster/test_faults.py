"""A chain on a real Slurm, and what becomes of it when things break."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))
from chains import Run, profile, wait_for  # noqa: E402

from hpc.cluster import Resources  # noqa: E402

SMALL = ("small=true", "n=24", "per_shard=4")
SLOW = (*SMALL, "pause=2.0", "only=double")  # a shard of double takes about four seconds


def test_a_chain_from_one_command(cluster: Testbed) -> None:
    run = Run(cluster)
    token = {"OPENAI_API_KEY": "planted-token-7b1"}
    run.submit("pause=0.05", env=token)
    run.check()
    found = run.status()
    assert found["state"] == "complete"
    shards = {stage["name"]: stage["shards"] for stage in found["stages"]}
    assert shards["double"] == {"done": 10, "total": 10}
    assert found["hours"]["core"] > 0
    assert "0" in run.submit().stdout.split()[-1:]  # nothing is missing
    names = [entry["name"] for entry in run.submitted()]
    assert len(names) == len(set(names)) == 11
    # No secret left the shell it was in.
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert b"planted-token" not in path.read_bytes(), path
    jobs = ",".join(entry["job"] for entry in run.submitted())
    for shown in ("--env-vars", "--batch-script"):
        said = cluster.run("sacct", "-j", jobs, shown, check=False)
        assert "planted-token" not in said.stdout + said.stderr


def test_a_job_of_several_nodes(cluster: Testbed) -> None:
    asked = profile(stages={"numbers": Resources(memory="400M", nodes=2, tasks=2, minutes=10)})
    run = Run(cluster, asked)
    run.submit(*SMALL, "ranks=true")
    run.check()
    told = [json.loads((run.path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert {entry["WORLD_SIZE"] for entry in told} == {"4"}
    assert [entry["LOCAL_RANK"] for entry in told] == ["0", "1", "0", "1"]
    assert len({(entry["MASTER_ADDR"], entry["MASTER_PORT"]) for entry in told}) == 1
    assert told[0]["MASTER_ADDR"].startswith("node")


def test_a_killed_worker(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SLOW)
    run.working("double", 2)[0].kill()
    run.check()
    assert 137 in {entry["status"] for entry in run.ended("double")}


def test_a_crashed_node(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SLOW)
    run.working("double")
    node = run.node("double")
    cluster.crash(node)
    time.sleep(15)
    cluster.restore(node)
    run.check()


def test_a_node_that_never_returns(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SLOW)
    run.working("double")
    cluster.crash(run.node("double"))
    run.check()


def test_preemption_of_all_workers(cluster: Testbed) -> None:
    run = Run(cluster, profile(partition="low"))
    run.submit(*SLOW)
    run.working("double", 2)
    words = ("sbatch", "-p", "high", "--exclusive", "-N", "4", "-t", "1", "--wrap", "sleep 5")
    cluster.run(*words, "--output=/dev/null")
    wait_for(lambda: any(e["asked"] == "leave" for e in run.ended("double")))
    run.check()


def test_told_that_the_time_limit_is_near(cluster: Testbed) -> None:
    """The signal that Slurm sends before the limit, sent by hand: nobody waits for minutes.

    On a cluster where jobs are only queued again if they asked for it.
    """
    with cluster.variant("no-requeue"):
        run = Run(cluster)
        run.submit(*SLOW, "steps=12")
        wait_for(lambda: (run.path / "steps").exists(), say=run.say)
        warn(cluster, run.job("work", "numbers"))
        run.working("double", 2)
        warn(cluster, run.job("work", "double"))
        run.check()
    for stage in ("numbers", "double"):
        assert {75, 138} & {entry["status"] for entry in run.ended(stage)}, stage
        assert max(entry["restart"] for entry in run.ended(stage)) == 1
    # Each step of the job was made once: it went on where it had stopped.
    assert (run.path / "steps").read_text().split() == [str(step) for step in range(12)]
    assert [entry["attempt"] for entry in run.submitted()] == [0] * 7


def warn(cluster: Testbed, job: str) -> None:
    cluster.run("scancel", "--batch", "--signal=USR1", job)


@pytest.mark.full  # limits are whole minutes
@pytest.mark.timeout(1800)
def test_the_time_limit(cluster: Testbed) -> None:
    asked = profile()
    asked.cpu.minutes, asked.cpu.grace = 2, 30
    run = Run(cluster, asked)
    run.submit("small=true", "n=8", "per_shard=2", "pause=40.0", "steps=130")
    run.wait(1500)
    run.check()
    for stage in ("numbers", "double"):
        assert {75, 138} & {entry["status"] for entry in run.ended(stage)}, stage
        assert max(entry["restart"] for entry in run.ended(stage)) >= 1
    assert (run.path / "steps").read_text().split() == [str(step) for step in range(130)]


def test_a_job_that_hangs(cluster: Testbed) -> None:
    run = Run(cluster, profile(stall=8.0))
    run.submit(*SMALL, "fault=numbers:hang")
    run.check()
    first = run.ended("numbers")[0]
    assert (first["status"], first["restart"]) == (75, 0) and first["seconds"] < 120
    log = (run.dir.logs("numbers") / "a0-0.log").read_text()
    assert "no progress for" in log and "misbehave" in log  # the stack


def test_single_elements_are_cancelled(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SLOW)
    run.working("double", 2)
    cluster.run("scancel", f"{run.job('work', 'double')}_0")
    run.check()


def test_cancel_during_preemption(cluster: Testbed) -> None:
    run = Run(cluster, profile(partition="low"))
    run.submit(*SLOW)
    run.working("double", 2)
    words = ("sbatch", "-p", "high", "--exclusive", "-N", "4", "-t", "1", "--wrap", "sleep 20")
    cluster.run(*words, "--output=/dev/null")
    wait_for(lambda: any(e["asked"] == "leave" for e in run.ended("double")))
    run.cancel()
    assert not run.queue()
    time.sleep(30)  # the other job is over, the credentials have expired
    assert not run.queue() and not run.payloads("double")
    assert run.status()["state"] == "cancelled"
    run.submit()
    run.check()


def test_the_controller_dies_during_submission(cluster: Testbed) -> None:
    run = Run(cluster)
    process = cluster.popen(*run.command("submit", run.profile, *SLOW))
    wait_for(lambda: len(run.submitted()) >= 3, pause=0.05)
    cluster.kill_controller()
    time.sleep(3)
    cluster.start_controller()
    assert process.wait(timeout=600) == 0
    run.check()
    assert_nothing_twice(run)


def test_the_controller_dies_during_a_stage(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SLOW)
    run.working("double", 2)
    time.sleep(6)  # a controller may forget what it learned within its last five seconds
    cluster.kill_controller()
    time.sleep(15)  # workers and their node's slurmd finish meanwhile, and cannot tell
    cluster.start_controller()
    run.check()
    assert_nothing_twice(run)


@pytest.mark.parametrize(
    ("tool", "pattern"),
    [
        pytest.param("sbatch", "*double.gate-a1*", id="between its two submissions"),
        pytest.param("scontrol", "*Dependency=*", id="before it rewrites dependencies"),
    ],
)
def test_a_gate_is_killed(cluster: Testbed, tool: str, pattern: str) -> None:
    run = Run(cluster)
    environment, asleep = run.interpose(tool, pattern)
    run.submit(*SLOW, "workers=1", env=environment)
    run.working("double")[0].kill()
    wait_for(asleep.exists, say=run.say)
    node = run.node("double", "gate")
    cluster.crash(node)
    time.sleep(12)
    cluster.restore(node)
    run.check()
    assert_nothing_twice(run)


def test_a_payload_that_cannot_start(cluster: Testbed) -> None:
    asked = profile()
    asked.gate.retries = 1
    run = Run(cluster, asked)
    told = run.folder / "told"
    asked.notify = f'printf "%s\\n" "$1" >>{told}'
    run.write(asked)
    run.submit(*SMALL, "fault=double:exit")
    reason = run.halted()
    assert "double" in reason and "exit status 7" in reason and "2 attempts" in reason
    assert told.read_text() == f"{run.path}: stopped: {reason}\n"
    run.submit("fault=none")
    run.check()
    assert told.read_text().splitlines()[1:] == [f"{run.path}: complete"]


def test_a_gate_that_cannot_start(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SMALL, "fault=gate:exit")
    assert "gate ended with status 1" in run.halted()
    run.submit("fault=none")
    run.check()


def test_two_submissions_at_once(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SMALL, "fault=numbers:user", check=False)  # makes the folder
    assert "/nowhere is not a model folder" in run.halted()
    both = [cluster.popen(*run.command("submit", run.profile, "fault=none")) for _ in range(2)]
    assert sorted(process.wait(timeout=600) for process in both) in ([0, 0], [0, 2])
    run.check()
    assert_nothing_twice(run)


def test_a_changed_configuration_is_refused(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SMALL)
    run.check()
    done = run.submit("factor=5", check=False)
    assert done.returncode == 2 and "factor: 2 → 5" in done.stderr
    assert not run.queue()


def test_a_paused_owner_comes_back(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SLOW)
    paused = run.working("double", 2)[0]
    owned = leases(run, paused.pid)
    paused.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: taken(run, owned), say=run.say)
    finally:
        paused.send_signal(signal.SIGCONT)
    run.check()


def leases(run: Run, pid: int) -> set[str]:
    """The leases that a process of this machine holds: files it has open."""
    folder = run.dir.leases("double")
    names: set[str] = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = link.readlink()
        if target.parent == folder:
            names.add(target.name)
    assert names
    return names


def taken(run: Run, owned: set[str]) -> bool:
    """Whether every shard of these leases is complete or in other hands."""
    folder = run.dir.leases("double")
    return not any((folder / name).exists() for name in owned)


def assert_nothing_twice(run: Run) -> None:
    """No name was ever queued under two ids that both began."""
    said = run.cluster.run("sacct", "-X", "-n", "-P", "-o", "JobName,JobIDRaw,Start,State").stdout
    ids: dict[str, set[str]] = {}
    for line in said.splitlines():
        name, job, start, _ = line.split("|")
        entries = {entry["name"] for entry in run.submitted()}
        if name in entries and start not in ("Unknown", "None"):
            ids.setdefault(name, set()).add(job)
    arrays = {entry["name"] for entry in run.submitted() if entry["role"] == "work"}
    for name, found in ids.items():
        if name not in arrays:
            assert len(found) == 1, (name, found)


@pytest.fixture(autouse=True)
def _no_job_left(cluster: Testbed) -> None:
    """Tests begin on an idle cluster."""
