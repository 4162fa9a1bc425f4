"""A real Slurm of several nodes on one machine, from nothing.

slurmctld, slurmdbd, MariaDB and munge share the head's namespaces; every slurmd has its own
(mount, UTS, PID), so that killing a node takes slurmd, the steps and the jobs down at once.
Nothing of the host's configuration is changed; only packages are installed and one folder filled.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files, machines
from .layout import HEAD, PACKAGES, USER, Layout, Settings, TestbedError, free_ports
from .machines import alive, enter, spawn, stop, tail, wait_until, write_if_changed

_SMALL = "48m"


def obstacle() -> str | None:
    """Why no test cluster can be had on this machine; None where it can."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    if shutil.which("unshare") is None or shutil.which("dpkg-query") is None:
        return "a test cluster needs Debian or Ubuntu with util-linux"
    probe = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "this machine does not allow new namespaces (in a container: --privileged)"
    if machines.not_installed(PACKAGES) and shutil.which("apt-get") is None:
        return f"not installed: {' '.join(machines.not_installed(PACKAGES))}"
    return None


class Testbed:
    """A test cluster in a folder, running or not.

    Args:
        root: See `Layout`.
        say: Told what is being done; nothing by default.

    Attributes:
        partition: Where jobs of tests go that do not ask for another.
    """

    __test__ = False  # for pytest: no class of tests
    partition = "batch"

    def __init__(self, root: Path | None = None, say: Any = lambda text: None) -> None:
        self.layout = Layout(root)
        self.settings = self.layout.load()
        self.say = say

    # ---- the whole cluster

    def up(self, settings: Settings | None = None) -> float:
        """Starts what does not run yet; returns the seconds it took.

        Raises:
            TestbedError: It cannot be had here, or a daemon does not come up.
        """
        wanted = settings or self.settings
        wanted.check()
        if reason := obstacle():
            raise TestbedError(reason)
        begun = time.monotonic()
        self._install()
        self.layout.make()
        with self._locked():
            if self._shape(wanted) != self._shape(self.settings) and self.running():
                self._down()
            wanted.port = self.settings.port if self.running() else free_ports(100)
            wanted.uid = self.settings.uid or files.free_uid()
            self.settings = wanted
            self.layout.save(wanted)
            changed = self._write()
            self._start_head()
            if not wanted.has("no-accounting"):
                self._start_accounting()
            if changed:
                stop(self.layout, "slurmctld")
            self._start_controller()
            for name in wanted.names:
                self._start_node(name)
            self.wait_ready()
        return time.monotonic() - begun

    def down(self, wipe: bool = False) -> None:
        """Stops everything; ``wipe`` also forgets every job, account and file."""
        if not self.layout.root.exists():
            return
        with self._locked():
            self._down()
            if wipe:
                self._unmount_small()
                shutil.rmtree(self.layout.root)

    def running(self) -> bool:
        return alive(self.layout, HEAD) is not None

    def wait_ready(self, seconds: float = 120) -> None:
        """Waits until the controller answers and every node takes jobs."""
        if not wait_until(lambda: not self._unusable(), seconds, 0.2):
            nodes = self.admin("sinfo", "-h", "-N", "-o", "%N %t %E", check=False)
            raise TestbedError(f"not every node is ready: {nodes.stdout or nodes.stderr}")

    def _unusable(self) -> set[str]:
        """The nodes that take no job now."""
        shown = self.admin("sinfo", "-h", "-N", "-o", "%N %t", check=False).stdout.split()
        states = dict(zip(shown[::2], shown[1::2], strict=False))
        takes = ("idle", "mix", "alloc", "comp")
        return {name for name in self.settings.names if states.get(name) not in takes}

    def _queued(self) -> str:
        return self.admin("squeue", "-h", "-o", "%A %T %R", check=False).stdout.strip()

    def reset(self) -> None:
        """Ends every job and takes every fault and variant back, as between two tests."""
        if self.settings.variants:
            self.switch(())
        for fault in self.layout.faults.iterdir():
            fault.unlink()
        for left in self.layout.small.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self._start_controller()
        for name in self.settings.names:
            self.thaw(name)
            self._start_node(name)
        if self._queued():
            self.admin("scancel", f"--user={USER}", check=False)
            if not wait_until(lambda: not self._queued(), 20, 0.3):
                self.admin("scancel", "--signal=KILL", f"--user={USER}", check=False)
                if not wait_until(lambda: not self._queued(), 40, 0.3):
                    raise TestbedError(f"jobs do not end: {self._queued()}")
        for name in self._unusable():
            self.admin("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        self.wait_ready()

    # ---- faults

    def crash(self, node: str) -> None:
        """The node is gone at once: slurmd, every step and every process of its jobs."""
        self._known(node)
        stop(self.layout, node, signal.SIGKILL)

    def restore(self, node: str) -> None:
        """A crashed node boots again and is used again."""
        self._known(node)
        self._start_node(node)
        shown = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        self.admin(*shown, check=False)

    def freeze(self, node: str) -> None:
        """Nothing on the node moves, nothing is lost: Slurm takes it for dead."""
        self._signal_all(node, signal.SIGSTOP)

    def thaw(self, node: str) -> None:
        """A frozen node goes on, unaware of what has happened."""
        self._signal_all(node, signal.SIGCONT)

    def spoil(self, node: str) -> None:
        """Jobs that start on the node fail to launch; Slurm drains it and holds them."""
        self._known(node)
        (self.layout.faults / f"{node}.broken").touch()

    def mend(self, node: str) -> None:
        """Takes `spoil` back."""
        self._known(node)
        (self.layout.faults / f"{node}.broken").unlink(missing_ok=True)
        self.admin("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def inject(self, node: str, environment: Mapping[str, str]) -> None:
        """Sets variables for the jobs that start on a node from now on; none to end it."""
        self._known(node)
        text = "".join(f"export {name}={value}\n" for name, value in environment.items())
        (self.layout.faults / f"{node}.env").write_text(text)

    def kill_controller(self) -> None:
        """kill -9 of slurmctld."""
        stop(self.layout, "slurmctld", signal.SIGKILL)

    def start_controller(self) -> None:
        """Starts slurmctld where it does not run."""
        self._start_controller()

    @contextlib.contextmanager
    def variant(self, *names: str) -> Iterator[Testbed]:
        """Another configuration for a while; jobs and nodes stay."""
        before = self.settings.variants
        self.switch(names)
        try:
            yield self
        finally:
            self.switch(before)

    def switch(self, variants: Sequence[str]) -> None:
        """Restarts the controller with other variants."""
        wanted = Settings(**{**vars(self.settings), "variants": tuple(variants)})
        self.up(wanted)

    # ---- commands

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        user: str = USER,
        cwd: Path | None = None,
        timeout: float = 120,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the head as the unprivileged user.

        Raises:
            TestbedError: It fails, unless ``check`` is off.
        """
        words = self.words(*command, env=env, user=user, cwd=cwd)
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, **options)
        if check and done.returncode:
            shown = " ".join(map(str, command))
            said = (done.stderr + done.stdout).strip()
            raise TestbedError(f"{shown}: status {done.returncode}: {said}")
        return done

    def popen(
        self,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        user: str = USER,
        cwd: Path | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Starts a command on the head; its process id is the command's own."""
        words = self.words(*command, env=env, user=user, cwd=cwd)
        return subprocess.Popen(words, text=True, **options)

    def admin(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command on the head as Slurm's administrator."""
        return self.run(*command, check=check, user="root")

    def words(
        self,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        user: str = USER,
        cwd: Path | None = None,
    ) -> list[str]:
        """The argument vector that runs a command on the head as a user."""
        home = Path("/") if user == "root" else self.layout.home
        variables = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(home),
            "USER": user,
            "LOGNAME": user,
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(machines.REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            **{k: v for k, v in os.environ.items() if k in ("TERM", "OMP_NUM_THREADS")},
            **(env or {}),
        }
        become = []
        if user != "root":
            uid = str(self.settings.uid)
            become = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"]
        settings = [f"{name}={value}" for name, value in variables.items()]
        place = ["env", "-i", f"--chdir={cwd or home}", *settings]
        return [*enter(self._head()), *become, *place, *map(str, command)]

    def folder(self, name: str) -> Path:
        """A fresh folder of the unprivileged user, seen by every node."""
        path = self.layout.home / f"{name}-{time.time_ns():x}"
        path.mkdir(parents=True)
        os.chown(path, self.settings.uid, self.settings.uid)
        return path

    def status(self) -> list[str]:
        """One line for each part of the cluster."""
        daemons = ["munged", "mariadbd", "slurmdbd", "slurmctld", *self.settings.names]
        lines = []
        for name in daemons:
            pid = alive(self.layout, name)
            lines.append(f"{name:10} {'pid ' + str(pid) if pid else 'down'}")
        variants = ", ".join(self.settings.variants) or "none"
        lines.append(f"{'variants':10} {variants}")
        if alive(self.layout, "slurmctld"):
            lines += self.admin("sinfo", "-N", "-l", check=False).stdout.splitlines()[1:]
        return lines

    # ---- parts

    def _install(self) -> None:
        missing = machines.not_installed(PACKAGES)
        if not missing:
            return
        self.say(f"installing {' '.join(missing)}")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        lock = ["-o", "DPkg::Lock::Timeout=300"]
        install = ["apt-get", *lock, "install", "-y", "-qq", "--no-install-recommends", *missing]
        for command in (["apt-get", *lock, "update", "-qq"], install):
            done = subprocess.run(command, capture_output=True, text=True, env=quiet)
            if done.returncode:
                raise TestbedError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")

    def _write(self) -> bool:
        """Writes the configuration; whether it changed."""
        layout, settings = self.layout, self.settings
        etc = layout.etc
        for folder in ("/etc/slurm", "/run/munge"):
            Path(folder).mkdir(parents=True, exist_ok=True)
        shown = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout
        version = tuple(int(part) for part in shown.split()[-1].split(".")[:2])
        devices = self._make_gpus()
        changed = write_if_changed(etc / "slurm.conf", files.slurm_conf(layout, settings))
        changed |= write_if_changed(etc / "gres.conf", files.gres_conf(layout, settings, devices))
        write_if_changed(etc / "cgroup.conf", files.cgroup_conf(version))
        write_if_changed(etc / "job_submit.lua", files.JOB_SUBMIT_LUA)
        write_if_changed(etc / "slurmdbd.conf", files.slurmdbd_conf(layout, settings), 0o600)
        write_if_changed(layout.root / "my.cnf", files.my_cnf(layout, settings))
        for name, text in (("prolog", files.PROLOG), ("task_prolog", files.TASK_PROLOG)):
            write_if_changed(etc / name, text.format(faults=layout.faults), 0o755)
        write_if_changed(etc / "passwd", files.passwd(layout, settings))
        write_if_changed(etc / "group", files.group(settings))
        write_if_changed(etc / "hosts", files.hosts(settings))
        os.chown(layout.home, settings.uid, settings.uid)
        if not layout.small.is_mount():
            options = f"size={_SMALL},mode=1777"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", layout.small])
        return changed

    def _make_gpus(self) -> bool:
        """Device files for the GPUs; whether this machine allows them."""
        for number in range(self.settings.gpus):
            path = self.layout.gpu / f"fake{number}"
            if not path.is_char_device():
                path.unlink(missing_ok=True)
                try:
                    os.mknod(path, 0o20666, os.makedev(1, 3))
                except PermissionError:
                    return False
        return True

    def _start_head(self) -> None:
        layout = self.layout
        if not self.running():
            machines.start_machine(layout, HEAD)
        if alive(layout, "munged"):
            return
        key = layout.root / "munge.key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(128))
        for path in (key, layout.munge):
            shutil.chown(path, "munge", "munge")
        for left in layout.munge.iterdir():
            left.unlink()
        munge = Path("/run/munge")
        options = {
            "key-file": key,
            "socket": munge / "munge.socket.2",
            "pid-file": munge / "munged.pid",
            "seed-file": munge / "munged.seed",
            "log-file": munge / "munged.log",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        become = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        self._daemon("munged", *become, "munged", "--foreground", "--force", *words)
        self._await("munged", "bash", "-c", "munge -n | unmunge")

    def _start_accounting(self) -> None:
        layout = self.layout
        if not alive(layout, "mariadbd"):
            self._start_database()
        if not alive(layout, "slurmdbd"):
            self._daemon("slurmdbd", "slurmdbd", "-D")
        self._await("slurmdbd", "sacctmgr", "-n", "show", "cluster")
        show = ["sacctmgr", "-n", "-P", "show", "user", USER, "format=user"]
        if USER not in self.admin(*show).stdout:
            for words in files.associations():
                self.admin("sacctmgr", "-i", "-Q", *words, check=False)  # fails where it stands
            if USER not in self.admin(*show).stdout:
                raise TestbedError(f"sacctmgr did not add {USER}")

    def _start_database(self) -> None:
        layout = self.layout
        config = layout.root / "my.cnf"
        if not (layout.mysql / "mysql").is_dir():
            self.say("making a database")
            layout.mysql.mkdir(exist_ok=True)
            shutil.chown(layout.mysql, "mysql", "mysql")
            make = ["mariadb-install-db", f"--defaults-file={config}", "--skip-test-db"]
            made = subprocess.run(
                [*make, "--auth-root-authentication-method=socket"], capture_output=True, text=True
            )
            if made.returncode:
                raise TestbedError(f"mariadb-install-db: {made.stderr.strip()[-500:]}")
        self._daemon("mariadbd", "mariadbd", f"--defaults-file={config}")
        client = ["--no-defaults", f"--socket={layout.mysql}/mysql.sock", "-uroot"]
        self._await("mariadbd", "mariadb-admin", *client, "ping")
        self.admin("mariadb", *client, "-e", files.database_sql())

    def _start_controller(self) -> None:
        if not alive(self.layout, "slurmctld"):
            self._daemon("slurmctld", "slurmctld", "-D")
        self._await("slurmctld", "bash", "-c", "scontrol ping | grep -q 'is UP'")

    def _start_node(self, name: str) -> None:
        if alive(self.layout, name):
            return
        (self.layout.spool / name).mkdir(exist_ok=True)
        machines.start_machine(self.layout, name, ["slurmd", "-D", "-N", name])

    def _daemon(self, name: str, *command: str) -> None:
        spawn(self.layout, name, [*enter(self._head()), *command])

    def _await(self, daemon: str, *probe: str, seconds: float = 180) -> None:
        """Waits until a probe succeeds."""

        def answered() -> bool:
            if not alive(self.layout, daemon):
                shown = tail(self.layout.log / f"{daemon}.out")
                raise TestbedError(f"{daemon} ended at once: {shown}")
            return self.admin(*probe, check=False).returncode == 0

        if not wait_until(answered, seconds):
            shown = tail(self.layout.log / f"{daemon}.out")
            raise TestbedError(f"{daemon} does not answer: {shown}")
        self.say(f"{daemon} answers")

    def _down(self) -> None:
        if self.running() and alive(self.layout, "slurmctld"):
            every = "--state=PENDING,RUNNING,SUSPENDED"
            for node in self.settings.names:
                self.thaw(node)
            self.admin("scancel", every, check=False)
            wait_until(lambda: not self._queued(), 8, 0.3)
        stop(self.layout, "slurmctld")
        for name in self.settings.names:
            stop(self.layout, name, signal.SIGKILL)
        for name in ("slurmdbd", "mariadbd", "munged"):
            stop(self.layout, name, seconds=20)
        stop(self.layout, HEAD, signal.SIGKILL)

    def _unmount_small(self) -> None:
        if self.layout.small.is_mount():
            subprocess.run(["umount", "--lazy", self.layout.small], check=True)

    def _signal_all(self, node: str, number: int) -> None:
        self._known(node)
        pid = alive(self.layout, node)
        if pid is None:
            return
        for inner in machines.inhabitants(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(inner, number)

    def _known(self, node: str) -> None:
        if node not in self.settings.names:
            raise TestbedError(f"no node {node}; there are {', '.join(self.settings.names)}")

    def _head(self) -> int:
        pid = alive(self.layout, HEAD)
        if pid is None:
            raise TestbedError("the cluster is down; start it with `up`")
        return pid

    def _shape(self, settings: Settings) -> tuple[int, ...]:
        return settings.nodes, settings.cpus, settings.memory, settings.gpus

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Two commands never start or stop the same cluster at once."""
        with (self.layout.root.with_suffix(".lock")).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
