"""Profiles, names and batch scripts, without a cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import counting  # noqa: E402

from hpc import control, gates, naming, slurm  # noqa: E402
from hpc.cluster import Profile, Resources, read_profile  # noqa: E402
from hpc.config import dump  # noqa: E402
from hpc.errors import UserError  # noqa: E402
from hpc.executors import batch  # noqa: E402
from hpc.executors.batch import host_name, write_host  # noqa: E402
from hpc.planning import chain_script, plan_of  # noqa: E402
from hpc.rundir import STOPPED, Chain, RunDir  # noqa: E402

ROOT = Path(__file__).parents[2]
TESTBED = ROOT / "configs" / "cluster" / "testbed.yaml"


def profile(tmp_path: Path, text: str) -> Profile:
    (tmp_path / "p.yaml").write_text(text)
    return read_profile(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: x", "partition"),
        ("gpu: {gpu: 1}", r"gpu\.gpus"),
        ("cpu: {minutes: 2, grace: 60}", "grace"),
        ("budget: {gpu_hours: .nan}", "budget.gpu_hours is nan; give 0 to 10,000,000"),
        ("lease_ttl: .nan", "lease_ttl is nan"),
        ("submit: {patience: .inf}", "submit.patience is inf"),
        ("gpu: {minutes: 100000000000}", "gpu.minutes is 100000000000; give 1 to 10,000,000"),
        ("partition: 'a b; rm'", "partition"),
        ("export: [PATH, OPENAI_API_KEY]", "OPENAI_API_KEY.*environment"),
        ("cpu: {memory: lots}", "16G"),
        ("cpu: {memory: 64}", "'64'; give a size and its unit"),
        ("stages: {x: {workers: 0}}", r"stages\.x\.workers"),
        ("gate: {retries: -1}", "retries"),
    ],
)
def test_a_profile_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        profile(tmp_path, text)
    assert "p.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_the_shipped_profile_is_good() -> None:
    assert read_profile(TESTBED).gate.retries == 3


def test_scripts_are_bash_and_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted")
    chain = counting.open_chain(tmp_path / "a run")
    asked = profile(tmp_path, "gate: {retries: 2}\nnotify: 'mail -s \"$1\" me'")
    planned = plan_of(chain, asked)
    assert [item.file for item in planned][:3] == ["preflight", "numbers", "numbers.gate"]
    folder = tmp_path / "scripts"
    folder.mkdir()
    for item in planned:
        path = folder / f"{item.file}.sh"
        path.write_text(item.text)
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "planted" not in item.text and "pickle" not in item.text
        exported = re.search(r"^#SBATCH --export=(.*)$", item.text, re.M)
        assert exported and "TOKEN" not in exported[1] and "ALL" not in exported[1].split(",")
    by_name = {item.name: item for item in planned}
    total = next(item for item in planned if item.file == "total")
    assert total.condition == "afterok"
    assert {by_name[name].file for name in total.after} == {"double.gate", "square.gate"}


def test_a_hand_made_submission_records_ids(tmp_path: Path) -> None:
    """chain.sh against an sbatch that only notes what it is asked, in another run directory."""
    chain = counting.open_chain(tmp_path / "planned", ["small=true"])
    planned = plan_of(chain, Profile(), by_hand=True)
    folder = tmp_path / "bin"
    folder.mkdir()
    for item in planned:
        assert str(tmp_path) not in item.text.replace(counting.__file__, "")
        (folder / f"{item.file}.sh").write_text(item.text)
    prepare = f'{sys.executable} {counting.__file__} prepare "$run" small=true >/dev/null'
    write_host(folder)
    script = chain_script(chain.run, planned, "runs/counting", prepare, "Written by a test")
    (folder / "chain.sh").write_text(script)
    fake = folder / "sbatch"
    fake.write_text(f'#!/bin/bash\necho "$PWD $@" >>{folder}/asked\nwc -l <{folder}/asked\n')
    fake.chmod(0o755)
    made = RunDir(tmp_path / "made here")
    bash = made.path / "slurm" / host_name() / "common.sh"
    words = ["bash", folder / "chain.sh", made.path]
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    subprocess.run(words, check=True, env=environment, capture_output=True)
    assert "scontrol requeue" in bash.read_text()
    assert {path.stem for path in bash.parent.iterdir()} == {"common", "contained", "work", "gate"}
    asked = (folder / "asked").read_text().splitlines()
    name = f"{naming.prefix(made)}-numbers-a0"
    where = f"{made.path} --parsable --job-name={name} --dependency=afterok:1"
    assert len(asked) == 7 and asked[1] == f"{where} {folder}/numbers.sh"
    entries = made.read_jobs()
    named = [item.name.replace(naming.prefix(chain.run), naming.prefix(made)) for item in planned]
    assert [entry["name"] for entry in entries] == named
    assert entries[3]["role"] == "work" and entries[4]["role"] == "gate"
    again = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert again.returncode == 2 and "submitted before" in again.stderr
    assert len((folder / "asked").read_text().splitlines()) == 7


def test_a_script_by_hand_finds_its_run(tmp_path: Path) -> None:
    """The text of a worker, run as Slurm would run it, in a directory it does not name."""
    chain = counting.open_chain(tmp_path / "planned", ["small=true"])
    asked = Profile(setup=["prefix=/opt/module name=other"])
    work = next(item for item in plan_of(chain, asked, by_hand=True) if item.file == "numbers")
    made = counting.open_chain(tmp_path / "made here", ["small=true"])
    naming.make_id(made.run)
    write_host(made.run.path / "slurm")
    gates.prepare(made, "numbers")
    done = subprocess.run(
        ["bash", "-c", work.text],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "SLURM_SUBMIT_DIR": str(made.run.path),
            "SLURM_JOB_ID": "7",
        },
        cwd=tmp_path,
    )
    assert done.returncode == 0 and gates.check(made, "numbers") == 0
    (entry,) = [entry for entry in made.run.read_jobs() if entry.get("event") == "ended"]
    assert entry["name"] == f"{naming.prefix(made.run)}-numbers-a0"


@pytest.mark.parametrize(("status", "swept"), [(0, True), (gates.SPARE, False)])
def test_a_worker_that_nobody_needs_ends_well(tmp_path: Path, status: int, swept: bool) -> None:
    """Only a worker of a complete stage sends the waiting ones away."""
    chain = counting.open_chain(tmp_path / "run", ["small=true"])
    naming.make_id(chain.run)
    write_host(chain.run.path / "slurm")
    asked = Profile(program=["bash", "-c", f"exit {status}"])
    work = next(item for item in plan_of(chain, asked) if item.file == "double")
    done = subprocess.run(
        ["bash", "-c", work.text],
        env={
            "PATH": "/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_ARRAY_JOB_ID": "6",
            "SLURM_ARRAY_TASK_ID": "1",
        },
    )
    (entry,) = [entry for entry in chain.run.read_jobs() if entry.get("event") == "ended"]
    assert done.returncode == 0 and (entry["job"], entry["status"]) == ("6_1", 0)
    assert (chain.run.path / "slurm" / "swept-6").exists() == swept


@pytest.mark.parametrize(
    ("ends", "starts", "status"),
    [
        ('[ "$n" = 2 ] || kill -9 $$; exit 0', 2, 0),
        ("kill -9 $$", 3, 137),
        ("exit 1", 1, 1),
        ("kill -USR1 $PPID; sleep 5", 1, 138),
    ],
)
def test_a_payload_that_is_killed_begins_again(
    tmp_path: Path, ends: str, starts: int, status: int
) -> None:
    """In its place, a few times; not one that failed by itself, or was asked to leave."""
    chain = counting.open_chain(tmp_path / "run", ["small=true"])
    naming.make_id(chain.run)
    write_host(chain.run.path / "slurm")
    count = tmp_path / "starts"
    asked = Profile(program=["bash", "-c", f"echo >>{count}; n=$(wc -l <{count}); {ends}"])
    work = next(item for item in plan_of(chain, asked) if item.file == "numbers")
    done = subprocess.run(
        ["bash", "-c", work.text], env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    )
    entries = [entry["event"] for entry in chain.run.read_jobs() if "event" in entry]
    assert len(count.read_text().splitlines()) == starts
    assert done.returncode == status and entries == ["began", "ended"]


def test_another_version_changes_no_job_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    before, kept = host_name(), write_host(run.path / "slurm") / "work.sh"
    told = kept.read_text()
    monkeypatch.setattr(batch, "_host", lambda: ("0123", {"work.sh": "", "gate.sh": ""}))
    assert write_host(run.path / "slurm").name == host_name() == "host-0123" != before
    assert kept.read_text() == told


@settings(deadline=None)
@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True), st.integers(0, 999))
def test_names_are_read_back(stage: str, attempt: int) -> None:
    run = RunDir("/nowhere/run")
    work = naming.work_name(run, stage, attempt)
    gate = naming.gate_name(run, stage, attempt)
    assert naming.parse_name(run, work) == (stage, "work", attempt)
    assert naming.parse_name(run, gate) == (stage, "gate", attempt)
    assert naming.parse_name(run, "iv-other-" + stage) is None


def test_what_squeue_prints() -> None:
    job = slurm._queued("12|0-3,7%2|iv-x-s-a0|PENDING||1-02:00:05|Resources, or | so")
    assert (job.count, job.seconds, job.reason) == (5, 93605, "Resources, or | so")
    assert slurm._queued("12|N/A|n|RUNNING|node1|0:07|None").count == 1


# ---- what a gate decides


def gated(tmp_path: Path, retries: int = 1) -> Chain:
    chain = counting.open_chain(tmp_path / "run", ["small=true"])
    asked = Profile(cpu=Resources(gpus=2))
    asked.gate.retries = retries
    (chain.run.path / "cluster.yaml").write_text(dump(asked))
    naming.make_id(chain.run)
    gates._SECOND_LOOK = 0.0
    assert control.payload(chain, ["preflight", "numbers"]) == 0
    assert control.payload(chain, ["work", "numbers"]) == 0
    assert control.payload(chain, ["gate", "numbers", "0", "0"]) == 0
    return chain


def end(chain: Chain, attempt: int, status: int, node: str = "n1", seconds: int = 36) -> None:
    chain.run.add_job(
        event="ended",
        name=naming.work_name(chain.run, "double", attempt),
        job="9_0",
        stage="double",
        attempt=attempt,
        role="work",
        node=node,
        seconds=seconds,
        gpus=2,
        status=status,
    )


def test_a_gate_retries_so_often_and_names_the_node(tmp_path: Path) -> None:
    chain = gated(tmp_path)
    (chain.run.path / "slurm" / "site.json").write_text(json.dumps({"nodes": 4}))
    end(chain, 0, 137)
    assert control.payload(chain, ["gate", "double", "0", "0"]) == gates.RETRY
    script = chain.run.path / "slurm" / f"{naming.work_name(chain.run, 'double', 1)}.sh"
    assert "#SBATCH --exclude=n1\n" in script.read_text()
    # Killed and started again it decides the same.
    assert control.payload(chain, ["gate", "double", "0", "0"]) == gates.RETRY
    assert control.payload(chain, ["gate", "double", "1", "0"]) == gates.STOP
    assert "2 attempts without progress" in (chain.run.marked(STOPPED) or "")


def test_a_time_limit_is_no_failure(tmp_path: Path) -> None:
    chain = gated(tmp_path, retries=0)
    end(chain, 0, 75)
    assert control.payload(chain, ["gate", "double", "0", "0"]) == gates.RETRY


def test_a_budget_ends_the_chain(tmp_path: Path) -> None:
    chain = gated(tmp_path, retries=5)
    path = chain.run.path / "cluster.yaml"
    path.write_text(path.read_text().replace("gpu_hours: 0.0", "gpu_hours: 0.5"))
    end(chain, 0, 137, seconds=1000)
    assert control.payload(chain, ["gate", "double", "0", "0"]) == gates.STOP
    assert "0.56 GPU-hours" in (chain.run.marked(STOPPED) or "")


def test_a_gate_behind_an_incomplete_parent_stops(tmp_path: Path) -> None:
    chain = gated(tmp_path)
    assert control.payload(chain, ["gate", "triple", "0", "0"]) == gates.STOP
    assert "double before it is not complete" in (chain.run.marked(STOPPED) or "")


def test_a_hung_job_prints_its_stacks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    counting.open_chain(run, ["small=true"])
    code = (
        "import sys, time, counting; from pathlib import Path; from hpc import work\n"
        "work._DUMP_SECONDS = 0.1\n"
        f"chain = counting.open_chain(Path({str(run)!r}))\n"
        "object.__setattr__(chain.stages['numbers'], 'run', lambda context: time.sleep(600))\n"
        "sys.exit(work.work(chain, 'numbers'))"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "HPC_STALL": "1.0",
        "PYTHONPATH": f"{Path(counting.__file__).parent}:{Path(control.__file__).parents[1]}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == gates.REQUEUE
    assert "no progress for" in done.stderr and "Thread" in done.stderr
