"""What stands where in a run: read from its directory alone, while it runs or after."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc import gates
from hpc.rundir import CANCELLED, STOPPED, Chain, RunDir, read_json
from hpc.shards import ShardError, list_folder, read_sidecar, shard_path, sidecars

if TYPE_CHECKING:
    from rich.table import Table

_HOURS = {"node": "node", "core": "core", "gpu": "GPU"}
_SHOWN = {
    "complete": "green",
    "skipped": "dim green",
    "running": "cyan",
    "stopped": "red",
    "cancelled": "red",
    "incomplete": "yellow",
    "outdated": "yellow",
    "waiting": "dim",
}


@dataclass
class JobCounts:
    """The jobs of a stage on a cluster, its gate among them.

    Attributes:
        running: How many run; each element of an array counts.
        pending: How many wait.
        held: How many of those nobody will start without being told to.
        why: Why the first of them waits, in the cluster's words.
    """

    running: int = 0
    pending: int = 0
    held: int = 0
    why: str = ""


@dataclass(frozen=True)
class Advance:
    """How far a stage is.

    Attributes:
        done: Inputs finished (map) or steps made (job).
        total: Of how many; 0 while nobody knows.
        shards: Complete shards.
        of_shards: Of how many; 0 for a job.
        errors: Inputs that failed, in complete shards.
        numbers: What the payload tells beside it (loss, tokens a second), the latest of each.
    """

    done: int
    total: int
    shards: int = 0
    of_shards: int = 0
    errors: int = 0
    numbers: dict[str, float] = field(default_factory=dict)


def advance(chain: Chain, name: str) -> Advance:
    """How far a stage is, from its sidecars and what its workers tell."""
    stage, run = chain.stages[name], chain.run
    told = _told(run, name)
    numbers: dict[str, float] = {}
    for entry in told:
        numbers.update(entry["numbers"])
    if stage.kind == "job":
        latest = told[-1] if told else {"done": 0, "total": 0}
        return Advance(int(latest["done"]), int(latest["total"]), numbers=numbers)
    source = run.read_manifest(next(iter(stage.inputs.values()))) or {}
    made = sidecars(run.shards(name))
    # Workers tell of their open shards only; complete ones stand in the sidecars.
    done = sum(sidecar.inputs for sidecar in made.values())
    done += sum(int(entry["done"]) for entry in told)
    total = int(source.get("inputs", 0))
    errors = sum(sidecar.errors for sidecar in made.values())
    shards = int(source.get("shards", 0))
    return Advance(min(done, total), total, len(made), shards, errors, numbers)


def status(
    chain: Chain,
    jobs: Mapping[str, JobCounts] | None = None,
    hours: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The whole run, as plain values.

    Args:
        chain: The chain.
        jobs: Of a run on a cluster: the jobs of each stage that wait or run.
        hours: Of a run on a cluster: what the jobs of each stage have used.

    Returns:
        ``{"run", "state", "reason", "stages": [{"name", "kind", "state", "inputs",
        "shards": {"done", "total"}, "rows", "errors", "seconds", "rate", "numbers"}, …]}``,
        for a stage at work ``"eta"``, the seconds it still takes at its rate,
        ``"sums"`` of what the stage counts beside rows (``tokens``),
        on a cluster also ``"jobs": {"running", "pending", "held", "why"}``, ``"hours": {"node",
        "core", "gpu"}`` and, where it used GPUs, ``"per_gpu_hour"``: rows, what else was counted,
        and seconds of the stage, and ``"jobs"`` and ``"hours"`` of all together.
        A run is complete, running, stopped, cancelled or incomplete. A stage is complete,
        running, incomplete (begun), outdated (made from what is no longer there), waiting, or
        skipped (a decision let it pass); an outdated and a skipped one have a ``reason``.
    """
    run = chain.run
    standing = gates.standing(chain)
    active = run.locked() if jobs is None else bool(jobs)
    stages = []
    for name in chain.stages:
        if jobs is None:
            stages.append(_stage(chain, name, standing[name], active))
        else:
            counts = jobs.get(name, JobCounts())
            entry = _stage(chain, name, standing[name], counts.running > 0)
            stages.append(entry | {"jobs": asdict(counts)})
        if hours is not None:
            stages[-1] |= used(hours.get(name, {}), stages[-1])
    stopped, cancelled = run.marked(STOPPED), run.marked(CANCELLED)
    if all(standing.values()):
        state, reason = "complete", ""
    elif cancelled is not None:
        state, reason = "cancelled", cancelled
    elif active and (stopped is None or jobs is None):
        state, reason = "running", ""
    elif stopped is not None:
        state, reason = "stopped", stopped
    else:
        state, reason = "incomplete", ""
    found: dict[str, Any] = {
        "run": str(run.path),
        "state": state,
        "reason": reason,
        "stages": stages,
    }
    if jobs is not None:
        found["jobs"] = asdict(_together(jobs.values()))
        if state == "running" and (held := found["jobs"]["held"]):
            found["reason"] = (
                f"{held} held ({found['jobs']['why']}): once their node is mended, "
                "`scontrol release` them, or cancel the run and retry"
            )
    if hours is not None:
        found["hours"] = {kind: sum(item[kind] for item in hours.values()) for kind in _HOURS}
    return found


def _together(jobs: Iterable[JobCounts]) -> JobCounts:
    """All jobs of a run, those of no stage included; held ones say why first."""
    found = JobCounts()
    for item in sorted(jobs, key=lambda item: not item.held):
        found.running += item.running
        found.pending += item.pending
        found.held += item.held
        found.why = found.why or item.why
    return found


def used(hours: Mapping[str, float], made: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's jobs have used, and made of it.

    Args:
        hours: Its node-, core- and GPU-hours.
        made: Its ``rows``, ``seconds`` and ``sums``.
    """
    found: dict[str, Any] = {"hours": {kind: hours.get(kind, 0.0) for kind in _HOURS}}
    if gpu := hours.get("gpu"):
        counted = {"rows": made["rows"], **made.get("sums", {}), "seconds": made["seconds"]}
        found["per_gpu_hour"] = {what: count / gpu for what, count in counted.items()}
    return found


def check_sizes(chain: Chain) -> None:
    """Compares each shard's size with its sidecar's: what a full disk or a copy has cut off.

    Looks at names and sizes alone, so it costs little; ``shards verify`` reads every byte.
    Shards that are not there make their stage incomplete, which `status` tells.

    Raises:
        ShardError: The first shard of another size.
    """
    for name in chain.stages:
        directory = chain.run.shards(name)
        folder = list_folder(directory)
        for index in sorted(folder.complete & folder.files):
            path = shard_path(directory, index)
            try:
                wanted, size = read_sidecar(path).bytes, path.stat().st_size
            except FileNotFoundError:
                continue  # its stage is being made again
            if size != wanted:
                raise ShardError(path, size, f"has {size} of {wanted} bytes")


def board(found: dict[str, Any]) -> Table:
    """What `status` found, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{Path(found['run']).name}: {found['state']}", title_justify="left")
    for heading in ("stage", "state"):
        table.add_column(heading)
    for heading in ("shards", "inputs", "rows", "errors", "time", "rate"):
        table.add_column(heading, justify="right")
    if on_cluster := any("jobs" in entry for entry in found["stages"]):
        table.add_column("jobs")
    kind = next((kind for kind in ("gpu", "core") if found.get("hours", {}).get(kind)), None)
    if kind is not None:
        table.add_column(f"{_HOURS[kind]}-h", justify="right")
    if by_gpu := any("per_gpu_hour" in entry for entry in found["stages"]):
        table.add_column("a GPU-h", justify="right")
    for entry in found["stages"]:
        shards, inputs = entry["shards"], entry["inputs"]
        table.add_row(
            entry["name"],
            Text(entry["state"], style=_SHOWN[entry["state"]]),
            _of(shards["done"], shards["total"]),
            _of(inputs["done"], inputs["total"]),
            f"{entry['rows']:,}" if entry["rows"] else "",
            Text(f"{entry['errors']:,}", style="red") if entry["errors"] else "",
            _time(entry),
            f"{entry['rate']:.3g}/s" if entry["rate"] else "",
            *([_jobs(entry["jobs"])] if on_cluster else []),
            *([_few(entry["hours"][kind])] if kind is not None else []),
            *([_rates(entry.get("per_gpu_hour", {}))] if by_gpu else []),
        )
    if "hours" in found and any(found["hours"].values()):
        used = "  ".join(f"{_HOURS[key]}-hours: {_few(x)}" for key, x in found["hours"].items())
        table.title = f"{table.title}   {used}"
    told = [Text(found["reason"], style="red")] if found["reason"] else []
    if told := told + [Text(reason) for reason in _reasons(found["stages"])]:
        table.caption = Text("\n").join(told)
        table.caption_justify = "left"
    return table


def _reasons(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why stages were skipped, each reason once, and why the first one is outdated."""
    skipped = [e["reason"] for e in stages if e["state"] == "skipped"]
    stale = [f"{e['name']} is outdated: {e['reason']}" for e in stages if e["state"] == "outdated"]
    return [f"skipped by {reason}" for reason in dict.fromkeys(skipped)] + stale[:1]


def _few(hours: float) -> str:
    """Hours with as many digits as they deserve."""
    return f"{hours:.1f}" if hours >= 100 else f"{hours:.2g}" if hours else ""


def _rates(found: Mapping[str, float]) -> str:
    """Of what was made in a GPU-hour: tokens and the like, else rows."""
    told = {what: count for what, count in found.items() if what not in ("rows", "seconds")}
    told = told or {what: count for what, count in found.items() if what == "rows"}
    return ", ".join(
        f"{count:,.0f} {what}" if count >= 100 else f"{count:.3g} {what}"
        for what, count in told.items()
        if count
    )


def duration(seconds: float) -> str:
    """Seconds as people read them: ``0.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _stage(chain: Chain, name: str, complete: bool, active: bool) -> dict[str, Any]:
    run, stage = chain.run, chain.stages[name]
    manifest = run.read_manifest(name)
    entry: dict[str, Any] = {"name": name, "kind": stage.kind, "numbers": {}}
    if manifest is not None:
        seconds, inputs = manifest["seconds"], manifest["inputs"]
        skipped = manifest.get("skipped")
        if skipped:
            entry["reason"] = f"{skipped['by']}: {skipped['reason']}"
        if not complete:
            behind = "what it is made from is to be made again"
            entry["reason"] = gates.outdated(chain, name, manifest) or behind
        return entry | {
            "state": "outdated" if not complete else "skipped" if skipped else "complete",
            "shards": {"done": manifest["shards"], "total": manifest["shards"]},
            "inputs": {"done": inputs, "total": inputs},
            "rows": manifest["rows"],
            "sums": manifest.get("sums", {}),
            "errors": manifest["errors"],
            "seconds": seconds,
            "rate": inputs / seconds if seconds else 0.0,
        }
    begun = read_json(run.started(name))
    if begun is None:
        return entry | {
            "state": "waiting",
            "shards": {"done": 0, "total": 0},
            "inputs": {"done": 0, "total": 0},
            "rows": 0,
            "sums": {},
            "errors": 0,
            "seconds": 0.0,
            "rate": 0.0,
        }
    now, made = advance(chain, name), sidecars(run.shards(name)).values()
    seconds = begun["spent"] + (time.time() - begun["since"] if active else 0.0)
    rate = now.done / seconds if seconds else 0.0
    if active and rate and now.total:
        entry["eta"] = (now.total - now.done) / rate
    return entry | {
        "state": "running" if active else "incomplete",
        "shards": {"done": now.shards, "total": now.of_shards},
        "inputs": {"done": now.done, "total": now.total},
        "rows": sum(sidecar.rows for sidecar in made),
        "sums": gates.add_sums(made),
        "errors": now.errors,
        "seconds": seconds,
        "rate": rate,
        "numbers": now.numbers,
    }


def _time(entry: dict[str, Any]) -> str:
    """How long a stage took, or has taken and will take at this rate."""
    if not entry["seconds"]:
        return ""
    left = f" of {duration(entry['seconds'] + entry['eta'])}" if "eta" in entry else ""
    return f"{duration(entry['seconds'])}{left}"


def _jobs(counts: dict[str, Any]) -> str:
    """``2 run, 3 wait (Resources)``."""
    said = [f"{counts['running']} run"] if counts["running"] else []
    if counts["pending"]:
        held = f", {counts['held']} held" if counts["held"] else ""
        said.append(f"{counts['pending']} wait ({counts['why']}{held})")
    return ", ".join(said)


def _of(done: int, total: int) -> str:
    if not total:
        return f"{done:,}" if done else ""
    return f"{done:,}" if done == total else f"{done:,} / {total:,}"


def _told(run: RunDir, name: str) -> list[dict[str, Any]]:
    """What a stage's workers last told, the latest at the end."""
    found: list[tuple[float, dict[str, Any]]] = []
    for path in run.progress(name).glob("*.json"):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            found.append((path.stat().st_mtime, entry))
        except (OSError, ValueError):
            continue  # replaced or removed this moment
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]
