"""What a test cluster looks like, and where its files lie."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, fields
from pathlib import Path

VARIANTS = {
    "no-accounting": "no slurmdbd: sacct knows nothing, no limit is enforced",
    "no-requeue": "JobRequeue=0: a job is requeued only if it asked for it with --requeue",
    "filter": "the site refuses jobs without a time limit, and those named *forbidden*",
}
PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "munge",
    "slurmdbd",
    "mariadb-server",
)
USER = "ivtest"
ACCOUNT = "lab"
HEAD = "head"


class TestbedError(Exception):
    """The cluster cannot be had, or did not do what was asked; the message says why."""

    __test__ = False  # for pytest: no class of tests


@dataclass
class Settings:
    """One cluster; kept in ``settings.json`` so that later commands know what runs.

    Attributes:
        nodes: How many; their names are node1, node2, ….
        cpus: Cores that each node pretends to have.
        memory: Megabytes that each node pretends to have.
        gpus: Fake GPUs of each node, type ``fake``; devices that read like /dev/null.
        variants: Names out of `VARIANTS`.
        port: The first of the ports in use; 0 chooses free ones.
        uid: Of the unprivileged user; 0 chooses a free one.
    """

    nodes: int = 4
    cpus: int = 8
    memory: int = 64000
    gpus: int = 4
    variants: tuple[str, ...] = ()
    port: int = 0
    uid: int = 0

    def check(self) -> None:
        """Refuses what cannot be."""
        if not 1 <= self.nodes <= 64 or not 1 <= self.cpus <= 256 or not 0 <= self.gpus <= 16:
            raise TestbedError("a cluster has 1-64 nodes of 1-256 cores and 0-16 GPUs")
        if unknown := set(self.variants) - set(VARIANTS):
            raise TestbedError(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")

    @property
    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    def has(self, variant: str) -> bool:
        return variant in self.variants


class Layout:
    """The paths of a cluster.

    Args:
        root: Holds everything; ``IV_TESTBED`` or /var/lib/insightv-testbed without it. Two
            clusters with different roots can run side by side.
    """

    def __init__(self, root: Path | None = None) -> None:
        chosen = root or Path(os.environ.get("IV_TESTBED") or "/var/lib/insightv-testbed")
        self.root = chosen.resolve()
        self.etc = self.root / "etc"  # bound over /etc/slurm on every machine
        self.munge = self.root / "munge"  # bound over /run/munge
        self.run = self.root / "run"  # who runs: one JSON file a process
        self.log = self.root / "log"
        self.state = self.root / "state"
        self.spool = self.root / "spool"
        self.gpu = self.root / "gpu"
        self.mysql = self.root / "mysql"
        self.faults = self.root / "faults"  # what the tests do to the jobs of a node
        self.home = self.root / "home"  # of the unprivileged user, shared by all machines
        self.small = self.root / "small"  # a shared file system that is quickly full
        self.settings_file = self.root / "settings.json"

    def make(self) -> None:
        """Makes the folders; those of daemons are closed to others."""
        for folder in (
            *(self.root, self.etc, self.munge, self.run, self.log, self.state, self.spool),
            *(self.gpu, self.faults, self.home, self.small),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o1777 if folder == self.small else 0o755)

    def load(self) -> Settings:
        """The settings of the cluster that was last started here, or the defaults."""
        try:
            stored = json.loads(self.settings_file.read_text())
        except (FileNotFoundError, ValueError):
            return Settings()
        known = {field.name for field in fields(Settings)}
        settings = Settings(**{key: value for key, value in stored.items() if key in known})
        settings.variants = tuple(settings.variants)
        return settings

    def save(self, settings: Settings) -> None:
        self.settings_file.write_text(json.dumps(asdict(settings), indent=1) + "\n")


def free_ports(count: int) -> int:
    """The first of ``count`` consecutive ports that nobody listens on."""
    for first in range(21000, 31000, 100):
        if all(_free(first + offset) for offset in range(count)):
            return first
    raise TestbedError("no free range of ports between 21000 and 31000")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
