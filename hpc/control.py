"""What the jobs around a stage decide: the payloads of gates and of the preflight.

They never call Slurm: the bash around them does, by their exit status. A gate that wants a
retry writes the scripts of the next attempt, which its bash submits.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from hpc import gates
from hpc.accounting import spent, totals
from hpc.cluster import Profile, read_profile
from hpc.decisions import skipped_by
from hpc.disk import make_folder, write_atomic
from hpc.errors import UserError
from hpc.inside import shadowed
from hpc.logs import last_line
from hpc.needs import refuse_unimportable
from hpc.provenance import image
from hpc.rundir import CANCELLED, STOPPED, Chain, read_json, write_json
from hpc.slurm import read_accounts
from hpc.work import work

_SAVED = {0, 75, 77, 130, 138, 143}
"""Statuses of workers that did nothing wrong."""


def payload(chain: Chain, words: list[str]) -> int:
    """Runs what a batch job's command asks for.

    Args:
        chain: The chain.
        words: ``work STAGE``, ``gate STAGE ATTEMPT FIRST`` or ``preflight STAGE…``.

    Returns:
        The exit status; 2 for what a user can mend, told in one line.
    """
    command, *rest = words
    try:
        if command == "work":
            return work(chain, rest[0])
        if command == "gate":
            return gate(chain, rest[0], int(rest[1]), int(rest[2]))
        if command == "preflight":
            return preflight(chain, rest)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        if command != "work":
            return _stop(chain, f"{' '.join([command, *rest[:1]])}: {error}")
        return 2
    raise UserError(f"{command}: no such payload; use work, gate or preflight")


def gate(chain: Chain, name: str, attempt: int, first: int) -> int:
    """Looks whether a stage is complete, and decides what follows.

    Args:
        chain: The chain.
        name: The stage.
        attempt: The attempt that has ended.
        first: The first attempt since the chain was last submitted.

    Returns:
        0: complete, and the stages behind it are prepared; those that it lets pass as a decision
        stand in a file, for bash to take their jobs out of the queue. 76: another attempt, whose
        scripts are written. 77: the chain stops; why stands in the run directory.
    """
    run = chain.run
    if run.marked(CANCELLED) is not None or run.marked(STOPPED) is not None:
        return gates.STOP
    skipped = skipped_by(chain, name)
    for parent in chain.stages[name].parents if skipped is None else ():
        if not gates.fresh(chain, parent):
            return _stop(chain, f"stage {name}: {parent} before it is not complete")
    profile = read_profile(run.path / "cluster.yaml")
    profile.place(chain)
    if not gates.fresh(chain, name):
        code = gates.check(chain, name)
        if code == gates.RETRY:
            return _again(chain, name, profile, attempt, first)
        if code != gates.DONE:
            return code
    if reason := _overspent(chain, profile):
        return _stop(chain, reason)
    passed = []
    for other, stage in chain.stages.items():
        if skipped_by(chain, other) is not None:
            # Its own gate may be at work by now: nothing of it is touched.
            if name in stage.unless and not gates.fresh(chain, other):
                passed.append(other)
        elif name in stage.parents and all(gates.fresh(chain, p) for p in stage.parents):
            gates.prepare(chain, other)
    if passed:
        folder = make_folder(run.path / "slurm")
        write_atomic(folder / f"passed-{name}", "\n".join(passed) + "\n")
    said = f"skipped by {skipped['by']}: {skipped['reason']}" if skipped else "complete"
    print(f"stage {name}: {said}", flush=True)
    if all(gates.standing(chain).values()):
        (run.path / "slurm" / "finished").touch()
    return gates.DONE


def preflight(chain: Chain, names: list[str]) -> int:
    """Tries what every job needs, on a node, and prepares the first stages.

    It runs once in each of the images that stages run in; the first time prepares.

    Returns:
        0, or 77 with the reason in the run directory.

    Raises:
        UserError: A package is missing that a stage needs.
    """
    try:
        _try_files(chain.run.path)
    except OSError as error:
        return _stop(
            chain,
            f"preflight: the file system of {chain.run.path} cannot hold a run "
            f"({error.strerror or error}); choose another",
        )
    if image() is not None and (found := shadowed()):
        said = f"the image's packages are shadowed by {', '.join(found[:3])}"
        return _stop(chain, f"preflight: {said}; bind no folder with packages")
    if (kept := chain.run.path / "cluster.yaml").exists():
        read_profile(kept).place(chain)
    refuse_unimportable(chain)
    for name in names:
        if not gates.fresh(chain, name):
            gates.prepare(chain, name)
    print("preflight: the node can work here", flush=True)
    return gates.DONE


def _again(chain: Chain, name: str, profile: Profile, attempt: int, first: int) -> int:
    """Another attempt for what is missing, unless there were too many."""
    from hpc.planning import scripts  # only a gate that retries makes batch scripts

    run = chain.run
    reason = gates.describe_missing(chain, name)
    left = len((read_json(run.missing(name)) or {}).get("shards", []))
    ends = [
        entry
        for entry in run.read_jobs()
        if entry.get("event") == "ended"
        and entry["role"] == "work"
        and (entry["stage"], entry["attempt"]) == (name, attempt)
    ]
    log = run.logs(name) / f"a{attempt}-0.log"
    if hopeless := [entry for entry in ends if entry["status"] == 2]:
        log = _log(chain, hopeless[-1])
        return _stop(chain, f"stage {name}: {last_line(log) or reason}; log: {log}")
    failed = [entry for entry in ends if entry["status"] not in _SAVED]
    for entry in failed:
        print(f"{entry['node']}: {entry['name']} ended with status {entry['status']}", flush=True)
    if failed:
        log = _log(chain, failed[-1])
        said = f"exit status {failed[-1]['status']} on {failed[-1]['node']}"
        line = last_line(log)
        reason = f"{said}: {line}; {reason}" if line else f"{said}; {reason}"
    asked = bool(ends) and not failed and any(entry["status"] == 75 for entry in ends)
    idle = _attempts_without_progress(chain, name, attempt, first, left, asked)
    if idle > profile.gate.retries:
        tries = f"after {idle} attempts without progress; log: {log}"
        if not profile.gate.retries:
            tries = "gates submit nothing here: `insightv retry` goes on"
        return _stop(chain, f"stage {name}: {reason} ({tries})")
    if overspent := _overspent(chain, profile):
        return _stop(chain, overspent)
    avoid = _avoidable(chain, {entry["node"] for entry in failed})
    scripts(chain, profile, name, attempt + 1, first, avoid, left or None)
    print(f"stage {name}: attempt {attempt + 1} after: {reason}", flush=True)
    if avoid:
        print(f"stage {name}: keeps away from {', '.join(avoid)}", flush=True)
    return gates.RETRY


def _attempts_without_progress(
    chain: Chain, name: str, attempt: int, first: int, left: int, asked: bool
) -> int:
    """How many attempts in a row have left as much as they found.

    An attempt that only ran into its time limit counts as progress.
    """
    path = chain.run.stage_dir(name) / "attempts.json"
    known: dict[str, Any] = read_json(path) or {}
    known[str(attempt)] = {"left": left, "asked": asked}
    write_json(path, known)
    idle, before = 0, None
    for number in sorted(int(key) for key in known if int(key) >= first):
        entry = known[str(number)]
        moved = entry["asked"] or (before is not None and entry["left"] < before)
        idle = 0 if moved else idle + 1
        before = entry["left"]
    return idle


def _avoidable(chain: Chain, nodes: set[str]) -> tuple[str, ...]:
    """Nodes to keep away from: those where a payload failed, unless that was all over."""
    size = (read_json(chain.run.path / "slurm" / "site.json") or {}).get("nodes", 0)
    return tuple(sorted(nodes)) if 2 * len(nodes) <= size else ()


def _overspent(chain: Chain, profile: Profile) -> str:
    """Says that the run's budget is used up, if it is."""
    limit = profile.budget.gpu_hours
    if not limit:
        return ""
    used = gpu_hours(chain)
    if used < limit:
        return ""
    return (
        f"{used:.2f} GPU-hours are used, the budget of {limit:g} (budget.gpu_hours); "
        "raise it in the profile and submit again"
    )


def gpu_hours(chain: Chain) -> float:
    """GPU-hours of a run's jobs, those that were killed included.

    What sacct told the gate's bash stands in a file, where there is a budget and sacct.
    """
    path = chain.run.path / "slurm" / "accounts"
    told = read_accounts(path.read_text(encoding="utf-8")) if path.exists() else None
    return totals(spent(chain.run.read_jobs(), told, time.time()))["gpu"]


def _log(chain: Chain, entry: dict[str, Any]) -> Path:
    """The log of a worker that told how it ended."""
    element = entry["job"].partition("_")[2] or "0"
    return chain.run.logs(entry["stage"]) / f"a{entry['attempt']}-{element}.log"


def _stop(chain: Chain, reason: str) -> int:
    if chain.run.marked(CANCELLED) is None and chain.run.marked(STOPPED) is None:
        chain.run.mark(STOPPED, reason)
    print(reason, file=sys.stderr, flush=True)
    return gates.STOP


def _try_files(run: Path) -> None:
    """Exclusive create, exclusive link, rename over, append: what leases and shards rest on.

    Raises:
        OSError: One of them does not work as it must.
    """
    folder = make_folder(run / "slurm" / "preflight")
    first, second = (folder / uuid.uuid4().hex for _ in range(2))
    try:
        descriptor = os.open(first, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(descriptor, b"1")
        os.fsync(descriptor)
        os.close(descriptor)
        os.link(first, second)
        for again in (
            lambda: os.open(first, os.O_CREAT | os.O_EXCL),
            lambda: os.link(first, second),
        ):
            try:
                again()
            except FileExistsError:
                continue
            raise OSError(0, "exclusive creation does not exclude")
        first.replace(second)
    finally:
        first.unlink(missing_ok=True)
        second.unlink(missing_ok=True)
