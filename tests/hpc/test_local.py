from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hpc.executors.base import Job, State
from hpc.executors.local import LocalExecutor

PYTHON = sys.executable


@pytest.fixture(params=["programs", "forks"])
def executor(request: pytest.FixtureRequest) -> Iterator[LocalExecutor]:
    made = LocalExecutor(preload=["json", "hpc.config"] if request.param == "forks" else [])
    yield made
    made.close()


def script(tmp_path: Path, text: str) -> tuple[str, ...]:
    path = tmp_path / "payload.py"
    path.write_text(text)
    return (PYTHON, str(path))


def wait(executor: LocalExecutor, handle: str, seconds: float = 60) -> State:
    return until(lambda: executor.state(handle), lambda state: state.running == 0, seconds)


def until(look: Callable[[], State], good: Callable[[State], bool], seconds: float = 60) -> State:
    give_up = time.monotonic() + seconds
    while not good(found := look()):
        assert time.monotonic() < give_up, found
        time.sleep(0.02)
    return found


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_environment_session_log_and_status(executor: LocalExecutor, tmp_path: Path) -> None:
    command = script(
        tmp_path,
        "import os, sys, signal\n"
        "print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], os.environ['EXTRA'])\n"
        "print(os.getsid(0) == os.getpid(), __name__, sys.stdin.read() == '')\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, 'café')\n"
        "print('to stderr', file=sys.stderr)\n"
        "import atexit; atexit.register(print, 'at exit')\n"
        "sys.exit(int(sys.argv[1]))\n",
    )
    job = Job("s", (*command, "5", "$HOME; x"), tmp_path / "logs", 3, 2, 7, env={"EXTRA": "é"})
    state = wait(executor, executor.submit(job))
    assert [status for status, _ in state.ended] == [5, 5]
    assert [log.name for _, log in state.ended] == ["a3-0.log", "a3-1.log"]
    for _, log in state.ended:
        said = log.read_text(encoding="utf-8")
        assert "['5', '$HOME; x'] 7 é" in said and "True __main__ True" in said
        assert "True café" in said and "to stderr" in said and "at exit" in said


def test_modules_and_crashes(executor: LocalExecutor, tmp_path: Path) -> None:
    job = Job("s", (PYTHON, "-m", "json.tool", "/nonexistent.json"), tmp_path)
    ((status, log),) = wait(executor, executor.submit(job)).ended
    assert status in (1, 2) and "nonexistent" in log.read_text()
    crash = script(tmp_path, "raise RuntimeError('out of luck')")
    ((status, log),) = wait(executor, executor.submit(Job("s", crash, tmp_path))).ended
    assert status == 1 and log.read_text().strip().endswith("RuntimeError: out of luck")


def test_no_such_program_is_a_status_and_a_log(tmp_path: Path) -> None:
    executor = LocalExecutor()
    ((status, log),) = wait(executor, executor.submit(Job("s", ("/no/such", "x"), tmp_path))).ended
    assert status == 127 and "/no/such: No such file" in log.read_text()


def test_cancel_reaches_the_whole_group(executor: LocalExecutor, tmp_path: Path) -> None:
    command = script(
        tmp_path,
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(300)\n",
    )
    handle = executor.submit(Job("s", command, tmp_path / "logs"))
    log = tmp_path / "logs" / "a0-0.log"
    until(lambda: executor.state(handle), lambda state: log.read_text().endswith("\n"))
    executor.cancel(handle)
    ((status, _),) = wait(executor, handle).ended
    assert status == -signal.SIGTERM
    child = int(log.read_text())
    assert until(lambda: gone(child), bool)  # signalled with the others, reaped by init


def test_kill_ends_what_ignores_the_request(executor: LocalExecutor, tmp_path: Path) -> None:
    command = script(
        tmp_path,
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
        "time.sleep(300)\n",
    )
    handle = executor.submit(Job("s", command, tmp_path / "logs"))
    log = tmp_path / "logs" / "a0-0.log"
    until(lambda: executor.state(handle), lambda state: "deaf" in log.read_text())
    executor.cancel(handle)
    time.sleep(0.2)
    assert executor.state(handle).running == 1
    executor.cancel(handle, kill=True)
    assert wait(executor, handle).ended[0][0] == -signal.SIGKILL


def test_close_leaves_nothing_behind(tmp_path: Path) -> None:
    for preload in ([], ["json"]):
        executor = LocalExecutor(preload=preload)
        command = script(tmp_path, "import time\ntime.sleep(300)\n")
        handle = executor.submit(Job("s", command, tmp_path / "logs", count=2))
        until(lambda: executor.state(handle), lambda state: len(state.processes) == 2)  # noqa: B023
        processes = executor.state(handle).processes
        executor.close()
        assert executor.state(handle).running == 0
        # A process that was killed may take a moment to go, on a machine with much to do.
        until(lambda: [pid for pid in processes if not gone(pid)], lambda left: not left)  # noqa: B023


@pytest.mark.parametrize("preload", [[], ["json"]])
def test_jobs_are_told_when_the_driver_is_killed(tmp_path: Path, preload: list[str]) -> None:
    payload = script(
        tmp_path,
        "import os, signal, sys, time\n"
        "def leave(number, frame):\n    print('asked to leave', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\nprint(os.getpid(), flush=True)\n"
        "while True: time.sleep(0.05)\n",
    )
    driver = (
        "import time\nfrom pathlib import Path\n"
        "from hpc.executors.local import LocalExecutor\nfrom hpc.executors.base import Job\n"
        f"executor = LocalExecutor(preload={preload!r})\nexecutor.submit("
        f"Job('s', {payload!r}, Path({str(tmp_path / 'logs')!r})))\n"
        "time.sleep(300)\n"
    )
    process = subprocess.Popen([PYTHON, "-c", driver])
    log = tmp_path / "logs" / "a0-0.log"
    idle = State(0)
    try:
        until(lambda: idle, lambda state: log.exists() and log.read_text().endswith("\n"))
    finally:
        process.kill()
        process.wait()
    worker = int(log.read_text().split("\n")[0])
    until(lambda: idle, lambda state: gone(worker))
    assert "asked to leave" in log.read_text()


def test_a_module_that_cannot_be_preloaded_costs_one_attempt(tmp_path: Path) -> None:
    executor = LocalExecutor(preload=["no_such_module_here"])
    try:
        command = script(tmp_path, "print('done')")
        first = wait(executor, executor.submit(Job("s", command, tmp_path))).ended[0][0]
        assert first == -signal.SIGKILL
        assert wait(executor, executor.submit(Job("s", command, tmp_path))).ended[0][0] == 0
    finally:
        executor.close()


def test_preloaded_modules_are_there_and_children_are_separate(tmp_path: Path) -> None:
    (tmp_path / "heavy_module.py").write_text("import os\nloaded_by = os.getpid()\nvalue = [0]\n")
    command = script(
        tmp_path,
        "import os, sys\nbefore = 'heavy_module' in sys.modules\nimport heavy_module\n"
        "heavy_module.value[0] += 1\n"
        "print(before, heavy_module.loaded_by != os.getpid(), heavy_module.value)\n",
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(tmp_path)
    executor = LocalExecutor(preload=["heavy_module"])
    try:
        state = wait(executor, executor.submit(Job("s", command, tmp_path / "logs", count=2)))
    finally:
        executor.close()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    assert [log.read_text().strip() for _, log in state.ended] == ["True True [1]"] * 2
