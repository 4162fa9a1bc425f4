"""Processes that outlive the command which started them, and namespaces to put them in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .layout import Layout, TestbedError

REPOSITORY = Path(__file__).resolve().parents[3]
_MACHINE = Path(__file__).with_name("machine.sh")
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

# Children of this process must be reaped here, or they stay as zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


def spawn(layout: Layout, name: str, command: Sequence[str | Path]) -> int:
    """Starts a process in a session of its own and remembers it under a name."""
    with (layout.log / f"{name}.out").open("ab") as log:
        child = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_ENVIRONMENT | {"LANG": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
    _children[child.pid] = child
    entry = {"pid": child.pid, "started": _started(child.pid)}
    (layout.run / f"{name}.json").write_text(json.dumps(entry))
    return child.pid


def alive(layout: Layout, name: str) -> int | None:
    """The process that was started under a name, unless it has ended."""
    try:
        entry = json.loads((layout.run / f"{name}.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    pid = entry["pid"]
    if pid in _children:
        _children[pid].poll()
    return pid if _started(pid) == entry["started"] else None


def stop(layout: Layout, name: str, number: int = signal.SIGTERM, seconds: float = 15) -> None:
    """Signals a process and waits until it has gone; after the time with SIGKILL."""
    pid = alive(layout, name)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if not wait_until(lambda: alive(layout, name) is None, seconds):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: alive(layout, name) is None, 10)
    (layout.run / f"{name}.json").unlink(missing_ok=True)


def _started(pid: int) -> int | None:
    """When a process began, in ticks since boot; None for the dead and for zombies."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    words = text.rpartition(") ")[2].split()
    return None if words[0] in "ZX" else int(words[19])


def start_machine(layout: Layout, name: str, daemon: Sequence[str] = ()) -> int:
    """Starts a machine: with a daemon in a PID namespace of its own, which dies as a whole."""
    (layout.run / f"{name}.ready").unlink(missing_ok=True)
    spaces = ["--mount", "--uts"]
    if daemon:
        spaces += ["--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
    command = ["unshare", *spaces, "bash", _MACHINE, name, layout.root, *doors(), "--", *daemon]
    pid = spawn(layout, name, command)
    ready = layout.run / f"{name}.ready"
    if not wait_until(lambda: ready.exists() or alive(layout, name) is None, 10):
        raise TestbedError(f"{name} did not start; see {layout.log / f'{name}.out'}")
    if alive(layout, name) is None:
        raise TestbedError(f"{name} ended at once: {tail(layout.log / f'{name}.out')}")
    return pid


def enter(pid: int) -> list[str]:
    """The words before a command that shall run on the machine of this process."""
    return ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--uts=/proc/{pid}/ns/uts"]


def inhabitants(pid: int) -> list[int]:
    """Every process in the PID namespace whose outer process this is."""
    space = Path(f"/proc/{pid}/ns/pid_for_children").readlink()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "ns" / "pid").readlink() == space:
                    found.append(int(entry.name))
    return found


def doors() -> list[str]:
    """Folders that the unprivileged user needs but cannot reach on this host.

    They are this repository, the virtual environment and the Python behind it.
    """
    wanted = {Path(sys.prefix), Path(sys.base_prefix).resolve(), REPOSITORY}
    shut = sorted(path for path in wanted if any(map(_closed, path.parents)))
    for path in shut:
        if _closed(path):
            raise TestbedError(f"{path}: others may not enter it; chmod o+x")
    return [str(path) for path in shut if not any(other in path.parents for other in shut)]


def _closed(path: Path) -> bool:
    return not path.stat().st_mode & stat.S_IXOTH


def wait_until(condition: Callable[[], object], seconds: float, every: float = 0.1) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


def tail(path: Path, lines: int = 4) -> str:
    """The end of a log, as one line."""
    with contextlib.suppress(OSError):
        return " | ".join(path.read_text(errors="replace").splitlines()[-lines:])
    return f"no {path}"


def write_if_changed(path: Path, text: str, mode: int = 0o644, owner: str = "") -> bool:
    """Writes in place (the file may be bound elsewhere); whether it was another text before."""
    if path.exists() and path.read_text() == text:
        return False
    with path.open("w") as file:
        path.chmod(mode)
        file.write(text)
    if owner:
        subprocess.run(["chown", f"{owner}:{owner}", path], check=True)
    return True


def not_installed(packages: Iterable[str]) -> list[str]:
    """Which Debian packages are not there."""
    form = "-f=${Package} ${Status}\n"
    asked = ["dpkg-query", "-W", form, *packages]
    lines = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
    there = {line.split()[0] for line in lines if line.endswith(" ok installed")}
    return [package for package in packages if package not in there]
