"""Small jobs that look at a cluster's nodes from inside, and at the file system between two.

The probe itself is bash (``hpc/executors/host/probe.sh``): it runs where no Python is.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc import container, slurm
from hpc.cluster import Profile
from hpc.disk import make_folder
from hpc.errors import UserError
from hpc.facts import Facts
from hpc.site import Finding, Kind, kinds

_PROBE = Path(__file__).parent / "executors" / "host" / "probe.sh"
_ROUNDS = 40
_MINUTES = 10  # a probe's time limit
_EVERY = 3.0  # seconds between looks
_LEAST_DISK = 20 * 2**30
_LEAST_INODES = 20_000
_SKEW = 60  # seconds
_LATE = 30_000  # milliseconds


@dataclass
class _Probe:
    kind: Kind
    folder: Path
    nodes: int
    job: str = ""
    left: str = ""  # why it was given up


def probe(
    profile: Profile,
    place: Path,
    command: Sequence[str],
    wait: float = 600.0,
    say: Callable[[str], None] = print,
    facts: Facts | None = None,
) -> list[Finding]:
    """Runs a probe on two nodes of every kind and tells what they found.

    Args:
        profile: The cluster.
        place: Where runs will lie; the probes work in a folder of their own in it.
        command: The payload's program where the profile names none.
        wait: Seconds to wait for nodes.
        say: Told what is being waited for.
        facts: What the cluster was asked before.

    Raises:
        UserError: Slurm refuses a probe or stays away, or ``place`` cannot be written.
    """
    name = uuid.uuid4().hex[:8]
    folder = make_folder(place.absolute() / f".check-{name}")
    partitions = (facts or Facts()).partitions
    probes, findings = [], []
    try:
        for number, kind in enumerate(kinds(profile)):
            there = [partitions[p] for p in kind.partition.split(",") if p in partitions]
            several = max((len(p.nodes) for p in there), default=2) > 1
            one = _Probe(kind, make_folder(folder / str(number)), 2 if several else 1)
            script = one.folder / "probe.sh"
            script.write_text(_text(one, profile, command, f"iv-check-{name}-{number}"))
            try:
                one.job = slurm.submit(script, f"iv-check-{name}-{number}", profile.export, 60)
            except UserError as error:
                findings.append(Finding("wrong", kind.title, str(error).partition(": ")[2]))
            else:
                probes.append(one)
        say(f"{len(probes)} probes queued, one for each kind of node")
        _wait(probes, f"iv-check-{name}-", wait)
        for one in probes:
            findings += _read(one)
    finally:
        with contextlib.suppress(UserError, slurm.SlurmError):
            slurm.cancel([one.job for one in probes if one.job], patience=30)
        shutil.rmtree(folder, ignore_errors=True)
    return findings


def _text(one: _Probe, profile: Profile, command: Sequence[str], name: str) -> str:
    """The probe's batch script."""
    kind = one.kind
    program, image = list(profile.program or command), profile.container_of(kind.resources)
    if image.image:
        asked = kind.resources.gpus
        words = image.inside(command)
        program = container.command(image, one.folder, words, asked, "probe")
    options = {
        "job-name": name,
        "partition": kind.partition,
        "account": kind.account,
        "qos": kind.qos,
        "constraint": kind.constraint,
        "nodes": one.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": 1,
        "gpus-per-node": kind.resources.gpus,
        "mem": kind.resources.memory,
        "time": min(_MINUTES, kind.resources.minutes),
        "output": one.folder / "log",
        "export": ",".join(profile.export),
        "chdir": one.folder,
    }
    settings = {
        "folder": str(one.folder),
        "peers": str(one.nodes),
        "gpus": str(kind.resources.gpus),
        "scratch": profile.scratch,
        "rounds": str(_ROUNDS),
        "image": image.image,
        "runtime": image.runtime,
    }
    known = [f"{key}={shlex.quote(value)}" for key, value in settings.items()]
    known.append(f"program=({shlex.join(program)})")
    probe = "\n".join([*known, _PROBE.read_text(encoding="utf-8")])
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={value}" for key, value in options.items() if value),
        *([f". {shlex.quote(profile.environment)}"] if profile.environment else []),
        *profile.setup,
        # Without --export a step gets no more than what --export of the job names.
        f"srun --export=ALL --ntasks={one.nodes} bash -c {shlex.quote(probe)} probe",
    ]
    return "\n".join(lines) + "\n"


def _wait(probes: Sequence[_Probe], prefix: str, seconds: float) -> None:
    """Until every probe has left the queue, or the time is over."""
    give_up = time.monotonic() + seconds
    while queued := slurm.queue(prefix):
        if time.monotonic() > give_up:
            for one in probes:
                reasons = [job.reason or job.state for job in queued if job.job == one.job]
                one.left = ", ".join(reasons)
            return
        time.sleep(_EVERY)


def _read(one: _Probe) -> Iterator[Finding]:
    """What a probe's tasks have written down."""
    title = one.kind.title
    if one.left:
        yield Finding("wrong", title, f"no node in time ({one.left}); ask for less, or wait longer")
        return
    facts = [_facts(one.folder / f"facts-{task}") for task in range(one.nodes)]
    for task, known in enumerate(facts):
        if "done" not in known:
            log = one.folder / "log"
            text = log.read_text(errors="replace") if log.exists() else "no log"
            where = known.get("node", [f"task {task}"])[0]
            last = " ".join(text.splitlines()[-3:])
            yield Finding("wrong", f"{title} on {where}", f"broke off: {last}")
    whole = [known for known in facts if "done" in known]
    for known in whole:
        yield from _of_node(title, known, one.kind)
    if len(whole) == 2:
        yield from _between(title, whole)
    elif one.nodes == 1:
        said = "one node only, nothing tried between two"
        yield Finding("note", f"{title} file system", said)


def _facts(path: Path) -> dict[str, list[str]]:
    """Values by name; a name may come more than once."""
    found: dict[str, list[str]] = {}
    own, place = str(path.parent), str(path.parents[2])  # people know the folder of their runs
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.replace(own, place).partition("\t")
            found.setdefault(name, []).append(value)
    return found


def _of_node(title: str, known: Mapping[str, list[str]], kind: Kind) -> Iterator[Finding]:
    node = known["node"][0]
    about = f"{title} on {node}"
    for path in known.get("closed", []):
        yield Finding("wrong", about, f"{path} is not writable there; mend it or name another")
    for line in known.get("disk", []):
        path, free, device = line.rsplit(" ", 2)
        room = int(free) * 1024 if free.isdigit() else 0
        level = "ok" if room >= _LEAST_DISK else "wrong"
        mend = "" if level == "ok" else "; free some space"
        said = f"{path} on {device}: {room / 2**30:.0f} GiB free{mend}"
        yield Finding(level, f"{about}, disk", said)
    for line in known.get("inodes", []):
        path, total, free = line.rsplit(" ", 2)
        if not total.isdigit() or total == "0":
            continue  # not every file system counts them
        enough = int(free) >= _LEAST_INODES
        mend = "" if enough else "; delete files"
        said = f"{path}: {int(free):,} files more{mend}"
        yield Finding("ok" if enough else "wrong", f"{about}, inodes", said)
    if kind.resources.gpus:
        yield from _of_gpus(about, known, kind.resources.gpus)
    for what in known.get("absent", []):
        said = f"{what} is not there; see `container` in the profile"
        yield Finding("wrong", f"{about}, container", said)
    for said in known.get("program", []):
        yield Finding("ok", f"{about}, program", said)
    for said in known.get("broken", []):
        yield Finding("wrong", f"{about}, program", f"does not start ({said})")


def _of_gpus(about: str, known: Mapping[str, list[str]], wanted: int) -> Iterator[Finding]:
    seen = int(known.get("gpus", ["0"])[0])
    if seen < wanted:
        said = f"{seen} given, {wanted} asked for; ask an administrator about gres.conf"
        yield Finding("wrong", f"{about}, GPUs", said)
        return
    driver = known.get("driver", [""])[0]
    failed = "fail" in driver.lower() or "error" in driver.lower()
    said = f"{seen}, {driver or 'nvidia-smi is not there'}"
    level = "wrong" if failed else "ok" if driver else "note"
    yield Finding(level, f"{about}, GPUs", said)
    for line in known.get("seen", []):
        yield _of_torch(f"{about}, torch", line, bool(driver) and not failed)


def _of_torch(about: str, line: str, driver: bool) -> Finding:
    """What the payload says of its GPUs: the status of `program gpus`, then its last line."""
    status, _, said = line.partition(" ")
    if status == "0":
        return Finding("ok", about, said)
    if status != "1":  # an older payload, in an image say
        return Finding("note", about, f"cannot be asked for its GPUs (status {status}: {said})")
    if not driver:
        return Finding("note", about, said)
    return Finding("wrong", about, f"{said}; install the CUDA build that docs/cluster.md names")


def _between(title: str, facts: Sequence[Mapping[str, list[str]]]) -> Iterator[Finding]:
    """What leases and shards rest on, tried by two nodes at once."""
    about = f"{title} file system"
    nodes = " and ".join(known["node"][0] for known in facts)
    for what, name in (("create", "exclusive create"), ("link", "exclusive link")):
        won = [int(known[f"won {what}"][0]) for known in facts]
        said = f"{won[0]} + {won[1]} of {_ROUNDS} won by {nodes}"
        if sum(won) == _ROUNDS:
            yield Finding("ok", f"{about}, {name}", said)
        else:
            mend = "runs cannot lie here, choose another file system"
            yield Finding("wrong", f"{about}, {name}", f"{said}; {mend}")
    torn = sum(int(value) for known in facts for value in known.get("torn", []))
    if torn:
        said = f"{torn} half-written texts were read; runs cannot lie here"
        yield Finding("wrong", f"{about}, rename", said)
    else:
        yield Finding("ok", f"{about}, rename", "whole texts only")
    late = max(int(value) for known in facts for value in known.get("late", ["0"]))
    said = f"a file of one node is seen by the other after {late / 1000:.1f} s"
    mend = "" if late < _LATE else "; leases would be taken from the living, raise lease_ttl"
    yield Finding("ok" if not mend else "wrong", f"{about}, visibility", said + mend)
    yield from _clocks(title, facts)


def _clocks(title: str, facts: Sequence[Mapping[str, list[str]]]) -> Iterator[Finding]:
    own, server = zip(*(map(int, known["clock"][0].split()) for known in facts), strict=True)
    skew = max(abs(own[0] - own[1]), *(abs(a - b) for a, b in zip(own, server, strict=True)))
    said = f"within {skew} s of one another and of the file system"
    if skew > _SKEW:
        yield Finding(
            "note", f"{title} clocks", f"{skew} s apart; logs mislead, leases do not care"
        )
    else:
        yield Finding("ok", f"{title} clocks", said)
