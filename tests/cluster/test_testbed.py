"""The test cluster itself: jobs, accounting, preemption, faults and every variant."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from testbed import ACCOUNT, USER, Settings, Testbed, TestbedError
from testbed.layout import free_ports
from testbed.machines import alive, wait_until

LONG = "sleep 600"


def submit(cluster: Testbed, script: str, *options: str, log: Path | None = None) -> str:
    words = ["--parsable", "--time=10", f"--output={log or '/dev/null'}", "--open-mode=append"]
    return cluster.run("sbatch", *words, *options, f"--wrap={script}").stdout.strip()


def shown(cluster: Testbed, job: str, name: str) -> str:
    """A field of `scontrol show job`, or nothing once Slurm has forgotten the job."""
    text = cluster.run("scontrol", "-o", "show", "job", job, check=False).stdout
    found = re.search(rf"(?<!\S){name}=(\S*)", text)
    return found[1] if found else ""


def wait_for(cluster: Testbed, job: str, state: str, seconds: float = 90) -> None:
    reached = wait_until(lambda: shown(cluster, job, "JobState") == state, seconds, 0.3)
    assert reached, cluster.run("scontrol", "show", "job", job, check=False).stdout


def accounted(cluster: Testbed, job: str, state: str) -> dict[str, str]:
    """The job's line of sacct, once that has heard of its end."""
    fields = ["User", "Account", "State", "AllocTRES", "ElapsedRaw", "NodeList"]
    ask = ["sacct", "-X", "-n", "-P", "-j", job, "-o", ",".join(fields)]

    def line() -> list[str]:
        return cluster.run(*ask).stdout.strip().split("|")

    assert wait_until(lambda: len(got := line()) > 2 and got[2].startswith(state), 90, 0.5), line()
    return dict(zip(fields, line(), strict=True))


def test_a_job_runs_as_the_unprivileged_user_with_this_python(cluster):
    folder = cluster.folder("python")
    say = 'import os, sys, numpy; print(os.getuid(), os.uname()[1], sys.prefix, os.listdir("."))'
    log = folder / "log"
    job = submit(cluster, f"{sys.executable} -c '{say}'", "--gpus=2", f"--chdir={folder}", log=log)
    wait_for(cluster, job, "COMPLETED")
    assert log.read_text() == f"{cluster.settings.uid} node1 {sys.prefix} ['log']\n"
    assert cluster.settings.uid >= 1000
    line = accounted(cluster, job, "COMPLETED")
    assert (line["User"], line["Account"], line["NodeList"]) == (USER, ACCOUNT, "node1")
    assert "gres/gpu=2" in line["AllocTRES"]


def test_the_user_can_neither_administer_nor_write_elsewhere(cluster):
    down = ["scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=x"]
    assert cluster.run(*down, check=False).returncode
    assert cluster.run("touch", cluster.layout.etc / "slurm.conf", check=False).returncode
    assert cluster.run("cat", "/etc/slurm/slurmdbd.conf", check=False).returncode
    with pytest.raises(TestbedError, match="unspecified|Invalid|invalid|not permitted"):
        submit(cluster, "true", "--account=nobody")


def test_one_job_spans_every_node_and_sees_its_gpus(cluster):
    nodes = len(cluster.settings.names)
    words = ["-N", str(nodes), "--gpus-per-node=2", "--time=1"]
    say = "echo $(hostname) $CUDA_VISIBLE_DEVICES"
    lines = cluster.run("srun", *words, "sh", "-c", say).stdout.splitlines()
    assert sorted(lines) == [f"{name} 0,1" for name in cluster.settings.names]


def test_the_host_is_left_as_it_was(cluster):
    assert USER not in Path("/etc/passwd").read_text()
    assert "head node1" not in Path("/etc/hosts").read_text()
    assert not (Path("/etc/slurm") / "task_prolog").exists()


def test_up_again_changes_nothing(cluster):
    names = ["head", "munged", "mariadbd", "slurmdbd", "slurmctld", *cluster.settings.names]
    before = [alive(cluster.layout, name) for name in names]
    assert None not in before
    other = Testbed(cluster.layout.root)
    other.up()
    assert [alive(other.layout, name) for name in names] == before


@pytest.mark.full  # what a chain makes of it stands beside this
def test_a_job_of_high_requeues_one_of_low(cluster):
    folder = cluster.folder("preempted")
    log = folder / "log"
    everywhere = ["--exclusive", f"--nodes={len(cluster.settings.names)}"]
    trap = "trap 'echo term; exit 1' TERM; echo begin ${SLURM_RESTART_COUNT:-0}; sleep 600 & wait"
    low = submit(cluster, trap, "-p", "low", *everywhere, log=log)
    wait_for(cluster, low, "RUNNING")
    assert wait_until(log.exists, 20)
    high = submit(cluster, "sleep 3", "-p", "high", *everywhere)
    wait_for(cluster, high, "COMPLETED")
    wait_for(cluster, low, "RUNNING")
    assert shown(cluster, low, "Restarts") == "1"
    assert wait_until(lambda: log.read_text().splitlines()[-1] == "begin 1", 20), log.read_text()


def test_short_takes_no_job_beyond_its_limit(cluster):
    job = submit(cluster, "true", "-p", "short", "--time=3")
    assert wait_until(lambda: shown(cluster, job, "Reason") == "PartitionTimeLimit", 30)
    job = submit(cluster, "true", "-p", "short", "--time=1")
    wait_for(cluster, job, "COMPLETED")


@pytest.mark.full  # what a chain makes of it stands beside this
def test_a_crashed_node_loses_its_job_to_another_and_returns(cluster):
    job = submit(cluster, LONG, "--requeue", "--nodelist=node2")
    assert wait_until(lambda: sleepers(cluster), 90)
    (sleeper,) = sleepers(cluster)
    cluster.crash("node2")
    assert wait_until(lambda: not Path(f"/proc/{sleeper}").exists(), 10)
    wait_for(cluster, job, "PENDING")
    assert node_state(cluster, "node2").startswith("down")
    cluster.restore("node2")
    wait_for(cluster, job, "RUNNING")
    assert shown(cluster, job, "Restarts") == "1"
    assert node_state(cluster, "node2") in ("mix", "mixed", "alloc", "allocated")


def sleepers(cluster: Testbed) -> list[int]:
    """Processes of `LONG`, by their ids on this host."""
    found = subprocess.run(
        ["pgrep", "-U", str(cluster.settings.uid), "-f", f"^{LONG}"], capture_output=True, text=True
    )
    return [int(line) for line in found.stdout.split()]


def node_state(cluster: Testbed, node: str) -> str:
    return cluster.run("sinfo", "-h", "-n", node, "-p", "batch", "-o", "%T").stdout.strip()


@pytest.mark.full  # what a chain makes of it stands beside this
def test_a_frozen_node_is_taken_for_dead_and_wakes_up(cluster):
    folder = cluster.folder("frozen")
    count = (
        f"for i in $(seq 1000); do echo $i >> {folder}/${{SLURM_RESTART_COUNT:-0}}; sleep .1; done"
    )
    job = submit(cluster, count, "--requeue", "--nodelist=node3")
    wait_for(cluster, job, "RUNNING")
    first = folder / "0"
    assert wait_until(first.exists, 20)
    cluster.freeze("node3")
    size = first.stat().st_size
    wait_for(cluster, job, "PENDING")
    assert first.stat().st_size == size
    cluster.thaw("node3")
    wait_for(cluster, job, "RUNNING")


@pytest.mark.full  # what a chain makes of it stands beside this
def test_an_element_is_requeued_by_its_own_name(cluster):
    array = submit(cluster, LONG, "--array=0-3", "--requeue")
    assert wait_until(lambda: len(sleepers(cluster)) == 4, 60)
    cluster.run("scontrol", "requeue", f"{array}_2")
    assert wait_until(lambda: restarts(cluster, array) == {0: 0, 1: 0, 2: 1, 3: 0}, 60)


def restarts(cluster: Testbed, array: str) -> dict[int, int]:
    text = cluster.run("scontrol", "-o", "show", "job", array).stdout
    found = re.findall(r"ArrayTaskId=(\d+) .*? Restarts=(\d+)", text)
    return {int(task): int(count) for task, count in found}


@pytest.mark.full  # what a chain makes of it stands beside this
def test_the_controller_comes_back_and_knows_its_jobs(cluster):
    job = submit(cluster, "sleep 12")
    wait_for(cluster, job, "RUNNING")
    time.sleep(7)  # a controller may forget what it learned within its last five seconds
    cluster.kill_controller()
    refused = cluster.run("sbatch", "--wrap=true", check=False, timeout=60)
    assert refused.returncode
    cluster.start_controller()
    wait_for(cluster, job, "COMPLETED")


def test_a_spoilt_node_holds_the_jobs_it_cannot_launch(cluster):
    cluster.spoil("node4")
    job = submit(cluster, "true", "--requeue", "--nodelist=node4")
    assert wait_until(lambda: "launch" in shown(cluster, job, "Reason").lower(), 60)
    assert node_state(cluster, "node4").startswith("drain")
    cluster.mend("node4")
    cluster.run("scontrol", "release", job)
    wait_for(cluster, job, "COMPLETED")


def test_jobs_of_one_node_see_what_is_injected_there(cluster):
    folder = cluster.folder("injected")
    cluster.inject("node1", {"WRONG": "clock"})
    for node in ("node1", "node2"):
        job = submit(cluster, 'echo "<$WRONG>"', f"--nodelist={node}", log=folder / node)
        wait_for(cluster, job, "COMPLETED")
    assert [(folder / node).read_text() for node in ("node1", "node2")] == ["<clock>\n", "<>\n"]


def test_the_small_file_system_is_full_for_every_node(cluster):
    small = cluster.layout.small
    fill = cluster.run("dd", "if=/dev/zero", f"of={small}/fill", "bs=1M", check=False)
    assert "No space left" in fill.stderr
    say = f"echo x > {small}/$SLURMD_NODENAME || echo full"
    assert cluster.run("srun", "-w", "node2", "sh", "-c", say).stdout == "full\n"
    cluster.run("rm", f"{small}/fill")
    assert cluster.run("srun", "-w", "node2", "sh", "-c", say).stdout == ""


@pytest.mark.full  # what a chain makes of it stands beside this
def test_a_quality_of_service_with_a_job_limit(cluster):
    jobs = [submit(cluster, LONG, "--qos=few") for _ in range(3)]
    assert wait_until(lambda: shown(cluster, jobs[2], "Reason") == "QOSMaxJobsPerUserLimit", 60)
    assert [shown(cluster, job, "JobState") for job in jobs] == ["RUNNING", "RUNNING", "PENDING"]
    with pytest.raises(TestbedError, match="QOSMaxSubmitJobPerUserLimit"):
        for _ in range(6):
            submit(cluster, LONG, "--qos=few")


@pytest.mark.full  # what a chain makes of it stands beside this
def test_without_accounting_jobs_run_but_sacct_is_blind(cluster):
    with cluster.variant("no-accounting"):
        job = submit(cluster, "true")
        wait_for(cluster, job, "COMPLETED")
        blind = cluster.run("sacct", "-j", job, check=False)
        assert blind.returncode
        assert "disabled" in blind.stderr
    job = submit(cluster, "true")
    assert accounted(cluster, job, "COMPLETED")["User"] == USER


@pytest.mark.full  # what a chain makes of it stands beside this
def test_where_requeue_is_off_a_job_must_ask_for_it(cluster):
    with cluster.variant("no-requeue"):
        plain, asking = submit(cluster, LONG), submit(cluster, LONG, "--requeue")
        wait_for(cluster, plain, "RUNNING")
        wait_for(cluster, asking, "RUNNING")
        refused = cluster.run("scontrol", "requeue", plain, check=False)
        assert refused.returncode
        assert "disabled" in refused.stderr
        cluster.run("scontrol", "requeue", asking)
        assert wait_until(lambda: shown(cluster, asking, "Restarts") == "1", 60)


@pytest.mark.full  # what a chain makes of it stands beside this
def test_a_site_filter_refuses_in_its_own_words(cluster):
    with cluster.variant("filter"):
        untimed = cluster.run("sbatch", "--wrap=true", check=False)
        assert untimed.returncode
        assert "site policy: every job names its time limit" in untimed.stderr
        with pytest.raises(TestbedError, match="this name is not allowed"):
            submit(cluster, "true", "--job-name=iv-forbidden-a0")
        wait_for(cluster, submit(cluster, "true"), "COMPLETED")
    cluster.run("sbatch", "--wrap=true", "--output=/dev/null")


def test_a_command_of_the_user_gets_its_signals(cluster):
    process = cluster.popen("sleep", "600")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_settings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(TestbedError, match="1-64 nodes"):
        Settings(nodes=0).check()
    with pytest.raises(TestbedError, match="no variant lunar; there are no-accounting"):
        Settings(variants=("lunar",)).check()
    with pytest.raises(TestbedError, match="is down"):
        Testbed(tmp_path / "none").run("true")
    assert free_ports(100) % 100 == 0
