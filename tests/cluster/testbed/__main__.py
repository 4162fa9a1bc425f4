"""The test cluster from a shell: up, down, status, faults, and commands as its user."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .cluster import Testbed
from .layout import VARIANTS, Settings, TestbedError

_FAULTS = {
    "crash": "kill a node with everything on it",
    "return": "boot a crashed node",
    "freeze": "stop every process of a node where it stands",
    "thaw": "let a frozen node go on",
    "spoil": "let no job start on a node: it is drained, the jobs are held",
    "mend": "take `spoil` back",
}
_OTHERS = {
    "status": "what runs",
    "reset": "end every job and every fault",
    "kill-controller": "kill -9 of slurmctld",
    "start-controller": "start slurmctld again",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="testbed", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start what does not run; the same again does nothing")
    shape = Settings()
    up.add_argument("--nodes", type=int, default=shape.nodes)
    up.add_argument("--cpus", type=int, default=shape.cpus, help="cores a node pretends to have")
    up.add_argument("--gpus", type=int, default=shape.gpus, help="GPUs a node pretends to have")
    known = "; ".join(f"{name}: {text}" for name, text in VARIANTS.items())
    up.add_argument("--variant", action="append", default=[], choices=list(VARIANTS), help=known)
    down = commands.add_parser("down", help="stop everything")
    down.add_argument("--wipe", action="store_true", help="and forget every job and file")
    for name, text in _FAULTS.items():
        commands.add_parser(name, help=text).add_argument("node")
    for name, text in _OTHERS.items():
        commands.add_parser(name, help=text)
    for name, who in (("as-user", "the unprivileged user"), ("as-root", "the administrator")):
        run = commands.add_parser(name, help=f"a command (or a shell) on the head, as {who}")
        run.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND …")
    return top


def main(words: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(words)
    cluster = Testbed(say=lambda text: print(f"testbed: {text}", file=sys.stderr))
    try:
        return _do(cluster, asked)
    except TestbedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 2


def _do(cluster: Testbed, asked: argparse.Namespace) -> int:
    if asked.command == "up":
        shape = {name: getattr(asked, name) for name in ("nodes", "cpus", "gpus")}
        seconds = cluster.up(Settings(**shape, variants=tuple(asked.variant)))
        print(f"{asked.nodes} nodes ready in {seconds:.1f} s ({cluster.layout.root})")
    elif asked.command == "down":
        cluster.down(asked.wipe)
    elif asked.command in ("as-user", "as-root"):
        user = {"user": "root"} if asked.command == "as-root" else {}
        command = cluster.words(*(asked.words or ["bash"]), **user)
        os.execvp(command[0], command)
    elif asked.command == "status":
        print("\n".join(cluster.status()))
    else:
        method = {"return": "restore"}.get(asked.command, asked.command.replace("-", "_"))
        getattr(cluster, method)(*([asked.node] if asked.command in _FAULTS else []))
    return 0


if __name__ == "__main__":
    sys.exit(main())
