"""A chain on a real Slurm, and what becomes of it when things break."""

from __future__ import annotations

import json
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))
from chains import Run, profile, wait_for  # noqa: E402

from hpc.cluster import Resources  # noqa: E402
from hpc.rundir import STOPPED  # noqa: E402

SMALL = ("small=true", "n=24", "per_shard=4")
SLOW = (*SMALL, "pause=2.0")  # a shard takes about four seconds


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
    node = cluster.run("squeue", "-h", "-t", "R", "-o", "%N").stdout.split()[0]
    cluster.crash(node)
    time.sleep(15)
    cluster.restore(node)
    run.check()


def test_preemption_of_all_workers(cluster: Testbed) -> None:
    run = Run(cluster, profile(partition="low"))
    run.submit(*SLOW)
    run.working("double", 2)
    words = ("sbatch", "-p", "high", "--exclusive", "-N", "4", "-t", "1", "--wrap", "sleep 5")
    cluster.run(*words, "--output=/dev/null")
    wait_for(lambda: any(e["asked"] == "leave" for e in run.ended("double")))
    run.check()


def test_the_time_limit_of_workers(cluster: Testbed) -> None:
    asked = profile()
    asked.cpu.minutes, asked.cpu.grace = 2, 30
    run = Run(cluster, asked)
    run.submit("small=true", "n=8", "per_shard=2", "pause=40.0")
    run.check()
    assert any(e["status"] in (75, 138) for e in run.ended("double"))
    assert max(e["restart"] for e in run.ended("double")) >= 1


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


def test_a_gate_killed_between_its_two_submissions(cluster: Testbed) -> None:
    run = Run(cluster)
    # The second job that the gate of `double` submits finds the gate's node dead.
    folder = run.folder / "bin"
    folder.mkdir()
    wrapper = folder / "sbatch"
    wrapper.write_text(
        "#!/bin/bash\n"
        f'case "$*" in *double.gate-a1*) [ -e {folder}/once ] || '
        f"{{ touch {folder}/once {folder}/now; sleep 60; }} ;; esac\n"
        'exec /usr/bin/sbatch "$@"\n'
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    folder.chmod(0o777)
    path = f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin"
    run.submit(*SLOW, "workers=1", env={"PATH": path})
    run.working("double")[0].kill()
    wait_for(lambda: (folder / "now").exists())
    gate = run.job("gate", "double")
    node = cluster.run("squeue", "-h", "-j", gate, "-o", "%N").stdout.strip()
    cluster.crash(node)
    time.sleep(12)
    cluster.restore(node)
    run.check()
    assert_nothing_twice(run)


def test_a_payload_that_cannot_start(cluster: Testbed) -> None:
    asked = profile()
    asked.gate.retries = 1
    run = Run(cluster, asked)
    run.submit(*SMALL, "fault=double:exit")
    wait_for(lambda: run.dir.marked(STOPPED) is not None and not run.queue(), say=run.say)
    reason = run.dir.marked(STOPPED) or ""
    assert "double" in reason and "exit status 7" in reason and "2 attempts" in reason
    run.submit("fault=none")
    run.check()


def test_a_gate_that_cannot_start(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SMALL, "fault=gate:exit")
    wait_for(lambda: run.dir.marked(STOPPED) is not None and not run.queue(), say=run.say)
    assert "gate ended with status 1" in (run.dir.marked(STOPPED) or "")
    run.submit("fault=none")
    run.check()


def test_two_submissions_at_once(cluster: Testbed) -> None:
    run = Run(cluster)
    run.submit(*SMALL, "fault=numbers:user", check=False)  # makes the folder
    wait_for(lambda: run.dir.marked(STOPPED) is not None and not run.queue(), say=run.say)
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
    paused.send_signal(signal.SIGSTOP)
    time.sleep(20)
    paused.send_signal(signal.SIGCONT)
    run.check()


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
