"""A chain on a real Slurm, and what becomes of it when things break."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from testbed import Site, Testbed

sys.path.insert(0, str(Path(__file__).parent))
from chains import Run, profile, wait_for  # noqa: E402

from hpc.cluster import Override  # noqa: E402

SMALL = ("small=true", "n=24", "per_shard=4")
SLOW = (*SMALL, "pause=2.0", "only=double")  # a shard of double takes about four seconds


def test_a_chain_from_one_command(slurm: Testbed | Site) -> None:
    run = Run(slurm)
    token = {"OPENAI_API_KEY": "planted-token-7b1"}
    run.submit("pause=0.05", env=token)
    run.check()
    found = run.status()
    assert found["state"] == "complete"
    shards = {stage["name"]: stage["shards"] for stage in found["stages"]}
    assert shards["double"] == {"done": 10, "total": 10}
    used = sum(stage["hours"]["core"] for stage in found["stages"])
    assert 0 < used <= found["hours"]["core"] * (1 + 1e-9)  # the preflight's beside them
    assert "0" in run.submit().stdout.split()[-1:]  # nothing is missing
    names = [entry["name"] for entry in run.submitted()]
    assert len(names) == len(set(names)) == 11
    # No secret left the shell it was in.
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert b"planted-token" not in path.read_bytes(), path
    jobs = ",".join(entry["job"] for entry in run.submitted())
    for shown in ("--env-vars", "--batch-script"):
        said = slurm.run("sacct", "-j", jobs, shown, check=False)
        assert "planted-token" not in said.stdout + said.stderr


def test_a_job_of_several_nodes(slurm: Testbed | Site) -> None:
    wide = Override(memory="400M", nodes=2, tasks=2, minutes=10)
    asked = profile(partition=slurm.partition, stages={"numbers": wide})
    run = Run(slurm, asked)
    run.submit(*SMALL, "ranks=true")
    run.check()
    told = [json.loads((run.path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert {entry["WORLD_SIZE"] for entry in told} == {"4"}
    assert [entry["LOCAL_RANK"] for entry in told] == ["0", "1", "0", "1"]
    assert len({(entry["MASTER_ADDR"], entry["MASTER_PORT"]) for entry in told}) == 1
    assert told[0]["MASTER_ADDR"] not in ("", "localhost", "127.0.0.1")


def test_a_decision_takes_out_of_the_queue_what_it_lets_pass(slurm: Testbed | Site) -> None:
    run = Run(slurm)
    # Ended by the decision: it would take ten minutes.
    run.submit("enough=doubles do", "n=400", "per_shard=4", "pause=6.0", "only=more")
    run.wait(300)
    found = run.status()
    states = {stage["name"]: stage["state"] for stage in found["stages"]}
    assert found["state"] == "complete"
    assert states.pop("more") == states.pop("sum") == "skipped"
    assert set(states.values()) == {"complete"}
    assert (run.dir.read_manifest("told") or {})["counts"] == {"sums": 0}
    assert not run.dir.progress("sum").exists()  # nobody had to wait for a node for nothing
    assert "0" in run.submit().stdout.split()[-1:]


def test_workers_killed_cancelled_and_paused(cluster: Testbed) -> None:
    killed, cancelled, paused = (Run(cluster) for _ in range(3))
    for run in (killed, cancelled, paused):
        run.submit(*SLOW)
    killed.working("double", 2)[0].kill()
    cancelled.working("double", 2)
    cluster.run("scancel", f"{cancelled.job('work', 'double')}_0")
    owner = paused.working("double", 2)[0]
    owned = leases(paused, owner.pid)
    owner.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: taken(paused, owned), say=paused.say)
    finally:
        owner.send_signal(signal.SIGCONT)
    for run in (killed, cancelled, paused):
        run.check()
    # It began again where it was.
    assert {entry["status"] for entry in killed.ended("double")} == {0}
    logs = "".join(path.read_text() for path in killed.dir.logs("double").glob("*.log"))
    assert "was killed (status 137); it begins again" in logs
    assert 143 in {entry["status"] for entry in cancelled.ended("double")}


def test_nodes_die_and_one_returns(cluster: Testbed) -> None:
    whole = Override(memory="400M", minutes=20, workers=2, cores=cluster.settings.cpus)
    run = Run(cluster, profile(stages={"double": whole}))
    run.submit(*SLOW)
    run.working("double", 2)
    returns, stays = run.nodes("double")
    cluster.crash(returns)
    cluster.crash(stays)
    time.sleep(15)
    cluster.restore(returns)
    run.check()


def test_preemption_of_all_workers_and_a_cancel_meanwhile(cluster: Testbed) -> None:
    kept, cancelled = (Run(cluster, profile(partition="low")) for _ in range(2))
    for run in (kept, cancelled):
        run.submit(*SLOW)
    for run in (kept, cancelled):
        run.working("double", 2)
    words = ("sbatch", "-p", "high", "--exclusive", "-N", "4", "-t", "1", "--wrap", "sleep 10")
    cluster.run(*words, "--output=/dev/null")
    for run in (kept, cancelled):
        wait_for(lambda run=run: any(e["asked"] == "leave" for e in run.ended("double")))
    cancelled.cancel()
    assert not cancelled.queue()
    kept.check()
    # The other job is over, the credentials have expired: nothing has come back.
    assert not cancelled.queue() and not cancelled.payloads("double")
    assert cancelled.status()["state"] == "cancelled"
    cancelled.submit()
    cancelled.check()


def test_preemption_that_cancels(cluster: Testbed) -> None:
    """Nothing is queued again by Slurm: the gate, where nobody preempts it, submits the rest."""
    asked = profile(partition="spare")
    asked.gate.partition = "batch"
    run = Run(cluster, asked)
    run.submit(*SLOW)
    run.working("double", 2)
    words = ("sbatch", "-p", "high", "--exclusive", "-N", "4", "-t", "1", "--wrap", "sleep 5")
    cluster.run(*words, "--output=/dev/null")
    run.check()
    assert {143} & {entry["status"] for entry in run.ended("double")}
    assert max(e["attempt"] for e in run.submitted() if e["stage"] == "double") == 1


def test_jobs_that_a_node_could_not_start(cluster: Testbed) -> None:
    """Slurm holds them until somebody releases them: `status` says so."""
    run = Run(cluster)
    run.submit(*SMALL, "steps=6")
    wait_for(lambda: (run.path / "steps").exists(), say=run.say)
    broken = run.nodes("numbers")[0]
    cluster.spoil(broken)
    wait_for(lambda: "held" in run.status()["reason"], pause=3.0, say=run.say)
    found = run.status()
    assert found["state"] == "running"
    assert found["jobs"]["held"] and "launch failed" in found["jobs"]["why"].replace("_", " ")
    cluster.mend(broken)
    wait_for(lambda: release(run), pause=3.0, say=run.say)
    run.check()


def release(run: Run) -> bool:
    """Releases what is held; whether nothing is."""
    held = [job for job, _, reason, _ in run.queue() if "held" in reason]
    for job in held:
        run.cluster.run("scontrol", "release", job, check=False)
    return not held


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


def test_a_worker_that_hangs(cluster: Testbed) -> None:
    """Another takes its shard over; it prints its stack and ends."""
    run = Run(cluster, profile(stall=8.0))
    run.submit(*SMALL, "fault=double:hang")
    run.check()
    (hung,) = [entry for entry in run.ended("double") if entry["status"] == 1]
    log = run.dir.logs("double") / f"a{hung['attempt']}-{hung['job'].partition('_')[2]}.log"
    assert "no call has ended for" in log.read_text() and "misbehave" in log.read_text()


def test_a_worker_without_work_leaves(cluster: Testbed) -> None:
    """Two shards, three workers: one ends well while the others are still busy."""
    asked = profile(linger=1.0)
    asked.cpu.workers = 3
    run = Run(cluster, asked)
    run.submit("small=true", "n=24", "per_shard=12", "pause=5.0", "only=double")
    run.check()
    ends = sorted(run.ended("double"), key=lambda entry: entry["time"])
    assert [entry["status"] for entry in ends] == [0, 0, 0]
    assert ends[0]["time"] < ends[1]["time"] - 5
    assert [entry["attempt"] for entry in run.submitted() if entry["stage"] == "double"] == [0, 0]


def test_too_many_failures_and_a_spent_budget(cluster: Testbed) -> None:
    failing, poor = Run(cluster), Run(cluster)
    asked = profile(stages={"numbers": Override(memory="400M", gpus=2, minutes=20)})
    asked.budget.gpu_hours = 0.001
    poor.write(asked)
    failing.submit(*SMALL, "fail_every=8")
    poor.submit(*SMALL, "steps=3")
    assert "3 of 24 inputs failed, more than its limit of 0.0%" in failing.halted()
    assert "the budget of 0.001 (budget.gpu_hours)" in poor.halted()
    failing.submit("error_limit=0.5")
    failing.wait()
    asked.budget.gpu_hours = 1.0
    poor.write(asked)
    poor.submit()
    poor.check()


def test_the_controller_dies(cluster: Testbed) -> None:
    """During the submission, and once more while a stage is at work."""
    run = Run(cluster)
    process = cluster.popen(*run.command("submit", run.profile, *SMALL, "pause=3.0", "only=double"))
    wait_for(lambda: len(run.submitted()) >= 3, pause=0.05)
    cluster.kill_controller()
    time.sleep(3)
    cluster.start_controller()
    assert process.wait(timeout=600) == 0
    run.working("double", 2)
    time.sleep(6)  # a controller may forget what it learned within its last five seconds
    cluster.kill_controller()
    time.sleep(15)  # workers end meanwhile, and cannot tell
    cluster.start_controller()
    run.check()
    assert_nothing_twice(run)


def test_gates_are_killed(cluster: Testbed) -> None:
    """With their node: between the two submissions, and before the dependencies are rewritten."""
    alone = profile()
    alone.cpu.workers = 1
    between, before = runs = [Run(cluster, alone) for _ in range(2)]
    asleep = []
    for run, tool, pattern in (
        (between, "sbatch", "*double.gate-a1*"),
        (before, "scontrol", "*Dependency=*"),
    ):
        environment, sleeps = run.interpose(tool, pattern)
        asleep.append(sleeps)
        run.submit(*SLOW, env=environment)
    for run in runs:
        run.working("double")
        run.kill("double")
    wait_for(lambda: all(path.exists() for path in asleep), say=between.say)
    nodes = {run.nodes("double", "gate")[0] for run in runs}
    for node in nodes:
        cluster.crash(node)
    time.sleep(12)
    for node in nodes:
        cluster.restore(node)
    for run in runs:
        run.check()
        assert_nothing_twice(run)


def test_chains_that_stop_and_go_on(cluster: Testbed) -> None:
    asked = profile()
    asked.gate.retries = 1
    payload, gate, twice = runs = [Run(cluster, asked) for _ in range(3)]
    told = payload.folder / "told"
    asked.notify = f'printf "%s\\n" "$1" >>{told}'
    payload.write(asked)
    for run, fault in zip(runs, ("double:exit", "gate:exit", "numbers:user"), strict=True):
        run.submit(*SMALL, f"fault={fault}")
    reason = payload.halted()
    assert "double" in reason and "exit status 7" in reason and "2 attempts" in reason
    assert told.read_text() == f"{payload.path}: stopped: {reason}\n"
    assert "gate ended with status 1" in gate.halted()
    log = next((gate.path / "slurm" / "logs").glob("*numbers.gate-a0.log")).read_text()
    assert log.count("trying again") == 2
    assert "/nowhere is not a model folder" in twice.halted()

    command = twice.command("submit", twice.profile, "fault=none")
    both = [cluster.popen(*command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert sorted(process.wait(timeout=600) for process in both) in ([0, 0], [0, 2])
    for run in (payload, gate):
        run.submit("fault=none")
    for run in runs:
        run.check()
        assert_nothing_twice(run)
    assert told.read_text().splitlines()[1:] == [f"{payload.path}: complete"]

    refused = twice.submit("factor=5", check=False)
    assert refused.returncode == 2 and "factor: 2 → 5" in refused.stderr
    assert not twice.queue()


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
