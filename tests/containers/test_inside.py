"""Payloads inside a real image: what enters, what comes out, and what ends a chain."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hpc.container import Container, command, pin, settings
from hpc.rundir import STOPPED, RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "a run")
    made.create()
    return made


def inside(
    container: Container, run: RunDir, *words: str, role: str = "work", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(container, run.path, words, role=role),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **variables},
    )


def test_words_and_values_arrive_as_they_are(image: Path, run: RunDir, scratch: Path) -> None:
    odd = "a b $(touch planted) `touch planted` 'x' \"y\" ,:"
    say = 'printf "%s\\n" "$@" "$SLURM_ODD" "${SECRET-none}" "$PYTHONNOUSERSITE" "$HOME"; pwd'
    done = inside(
        pin(Container(str(image))),
        run,
        *("bash", "-c", say, "bash", odd),
        SLURM_ODD=odd,
        SECRET="told",
        APPTAINERENV_PYTHONPATH="/evil",
        PYTHONPATH="/evil",
    )
    assert done.stdout.splitlines() == [odd, odd, "none", "1", "/tmp/home", str(run.path)]
    assert not list(run.path.rglob("planted"))


def test_nothing_of_the_host_shows_but_what_is_bound(
    image: Path, run: RunDir, tmp_path: Path, scratch: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "seen").touch()
    (tmp_path / "unseen").touch()
    container = pin(Container(str(image), binds=[f"{data}:/data:ro"]))
    look = (
        'ls /data; ls -A /root; ls -A /home; [ ! -e "$1/unseen" ] && echo hidden; '
        'touch /tmp/x "$2/made"; touch /data/no 2>/dev/null || echo read-only; '
        "env | grep -c =/tmp/"
    )
    words = ("bash", "-c", look, "bash", str(tmp_path), str(run.path))
    done = inside(container, run, *words, HOME=str(tmp_path))
    *said, caches = done.stdout.splitlines()
    assert said == ["seen", "hidden", "read-only"], done.stdout + done.stderr
    assert int(caches) >= 8 and (run.path / "made").exists()
    assert not list(scratch.glob("hpc-*/job-*")), "the job's own folder was left behind"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)])
def test_signals_reach_the_payload(
    image: Path, run: RunDir, number: signal.Signals, status: int
) -> None:
    text = (
        "trap 'touch heard-USR1; exit 75' USR1; trap 'touch heard-TERM; exit 143' TERM; "
        "touch ready; for i in {1..600}; do sleep 0.1; done"
    )
    words = command(pin(Container(str(image))), run.path, ["bash", "-c", text])
    with subprocess.Popen(words) as running:
        give_up = time.monotonic() + 120
        while not (run.path / "ready").exists():
            assert time.monotonic() < give_up and running.poll() is None
            time.sleep(0.05)
        running.send_signal(number)
        assert running.wait(60) == status
    assert (run.path / f"heard-{number.name[3:]}").exists()


def test_statuses_come_out(image: Path, run: RunDir) -> None:
    container = pin(Container(str(image)))
    for status in (0, 76, 77):
        assert inside(container, run, "bash", "-c", f"exit {status}").returncode == status


def test_another_image_under_the_same_name_ends_the_chain(
    image: Path, run: RunDir, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.sif"
    copy.write_bytes(image.read_bytes())
    container = pin(Container(str(copy)))
    os.utime(copy, (1, 1))
    assert inside(container, run, "true").returncode == 0, "same bytes, another time"
    with copy.open("ab") as file:
        file.write(b"more")
    done = inside(container, run, "true")
    assert done.returncode == 77
    reason = run.marked(STOPPED) or ""
    assert "is another image now" in reason and "\n" not in reason


def test_an_image_that_is_gone(image: Path, run: RunDir, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sif"
    copy.write_bytes(image.read_bytes())
    container = pin(Container(str(copy)))
    copy.unlink()
    done = inside(container, run, "true")
    assert done.returncode == 125 and "is not there" in done.stderr
    assert run.marked(STOPPED) is None, "other nodes may have it"
    assert inside(container, run, "true", role="preflight").returncode == 77
    assert "copy.sif is not there" in (run.marked(STOPPED) or "")


def test_no_user_namespaces(image: Path, run: RunDir) -> None:
    words = command(pin(Container(str(image))), run.path, ["true"], role="preflight")
    limit = 'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "bash", "-c", limit, "limited", *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 77, done.stderr
    reason = run.marked(STOPPED) or ""
    assert "cannot run" in reason and "docs/containers.md" in reason and "\n" not in reason


def test_an_image_in_local_scratch(image: Path, run: RunDir, scratch: Path) -> None:
    container = pin(Container(str(image), local=True))
    say = ("bash", "-c", "echo $APPTAINER_CONTAINER; echo $HPC_IMAGE")
    done = inside(container, run, *say)
    copy = scratch / f"hpc-{os.getuid()}" / "images" / f"{container.sha256}.sif"
    assert done.stdout.splitlines() == [str(copy), str(image)], done.stderr
    copy.unlink()
    copy.parent.rmdir()
    copy.parent.touch()  # nowhere to copy to
    done = inside(container, run, *say)
    assert done.stdout.splitlines() == [str(image), str(image)]
    assert "not copied" in done.stderr


def test_what_dead_jobs_left_is_removed(image: Path, run: RunDir, scratch: Path) -> None:
    container = pin(Container(str(image)))
    left = scratch / f"hpc-{os.getuid()}" / "job-left0000"
    left.mkdir(parents=True)
    (left.parent).chmod(0o700)
    (left / "big").touch()
    words = command(container, run.path, ["sleep", "60"])
    with subprocess.Popen(words) as running:
        try:
            give_up = time.monotonic() + 60
            while left.exists():
                assert time.monotonic() < give_up
                time.sleep(0.1)
            (living,) = left.parent.glob("job-*")
            assert inside(container, run, "true").returncode == 0
            assert living.exists(), "the folder of a job that runs was removed"
        finally:
            running.terminate()


def test_the_text_is_bash(tmp_path: Path) -> None:
    container = Container("/images/it's.sif", "0" * 64, binds=["/a b:/c"], options=["--x=$(id)"])
    text = "\n".join(settings(container, 8, "/scratch dir"))
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    show = f'{text}\nprintf "%s\\n" "$image" "${{image_options[@]}}" "${{image_binds[@]}}"'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["/images/it's.sif", "--x=$(id)", "/a b:/c"]
