"""What a chain will take, from what a smaller run of the same chain took.

A stage's work is counted in units (questions, paths, samples seen), which whoever knows the
stages supplies. What grows with them is scaled; what every process pays once, its way from
start to ready, and what every stage pays once, the models it writes, is not.

A range is the middle estimate and about 95 % around it, from three sources: how much bytes a
unit differ between shards, how few records a yield was counted on, and clocks that count whole
seconds. Waiting for nodes, and work done twice, are in none of them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc import gates
from hpc.accounting import by_stage, spent
from hpc.cluster import Profile
from hpc.retention import size
from hpc.rundir import Chain, RunDir, read_json, write_json
from hpc.shards import sidecars
from hpc.stages import Stage

_UNKNOWN_SPREAD = 0.25  # of a stage with too few shards to tell


@dataclass(frozen=True)
class Range:
    """An estimate with about 95 % around it."""

    low: float
    mid: float
    high: float

    def __add__(self, other: Range) -> Range:
        """The sum of two estimates that err together."""
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def holds(self, value: float) -> bool:
        """Whether a value lies within."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Measured:
    """What a complete stage took.

    Attributes:
        units: How much work it was.
        inputs: Records that went in, or groups that a job made.
        rows: Records that came out.
        shards: Its shards.
        files: Everything in its folder and outputs, but for logs.
        data: Bytes of its shards.
        beside: Other bytes in its folder, which grow with the work (pictures).
        outputs: Bytes of what it left elsewhere, which do not (models).
        spread: Standard error of bytes a unit, as a share; also of the yield, where a job
            chooses what it keeps.
        seconds: At work, of all its processes together.
        ready: Of those, what one process needs before it begins.
        starts: How many processes began.
        gap: Seconds of the stage in which none was at work: queue and gate.
    """

    units: float
    inputs: int
    rows: int
    shards: int
    files: int
    data: int
    beside: int
    outputs: int
    spread: float
    seconds: float = 0.0
    ready: float = 0.0
    starts: int = 1
    gap: float = 0.0


@dataclass(frozen=True)
class Expected:
    """What a stage will take.

    Attributes:
        stage: Its name.
        processes: How many work at once.
        gpus: GPUs of all of them.
        shards: Its shards.
        rows: Records that come out.
        files: In its folder and outputs.
        data: Bytes of its shards.
        bytes: Of everything it leaves.
        gpu_hours: None where no times were measured.
        wall: Seconds from its parents' end to its own. Likewise.
    """

    stage: str
    processes: int
    gpus: int
    shards: int
    rows: int
    files: int
    data: Range
    bytes: Range
    gpu_hours: Range | None = None
    wall: Range | None = None


@dataclass(frozen=True)
class Forecast:
    """What a chain will take.

    Attributes:
        source: Where the numbers are from, in words.
        stages: Each stage.
        bytes: Of the whole run directory.
        gpu_hours: Of all stages; None where no times were measured.
        wall: Seconds of the longest way through the chain. Likewise.
    """

    source: str
    stages: list[Expected] = field(default_factory=list)
    bytes: Range = Range(0, 0, 0)
    gpu_hours: Range | None = None
    wall: Range | None = None


# ---- measuring


def measure(chain: Chain, units: Mapping[str, float], timed: bool = True) -> dict[str, Measured]:
    """What each complete stage of a run took.

    Args:
        chain: The run.
        units: Each stage's work.
        timed: With times, which only hold for the machines they were measured on.

    A stage that a decision let pass tells nothing and is left out.
    """
    entries = chain.run.read_jobs() if timed else []
    return {
        name: _measured(chain, stage, units[name], entries, timed)
        for name, stage in chain.stages.items()
        if gates.fresh(chain, name) and not (chain.run.read_manifest(name) or {}).get("skipped")
    }


def _measured(
    chain: Chain, stage: Stage, units: float, entries: list[dict[str, Any]], timed: bool
) -> Measured:
    run, name = chain.run, stage.name
    manifest = run.read_manifest(name) or {}
    kept = [path for path in run.stage_dir(name).rglob("*") if path.is_file()]
    kept = [path for path in kept if not path.is_relative_to(run.logs(name))]
    inside = sum(path.stat().st_size for path in kept)
    outputs = [run.path / output for output in stage.outputs]
    outputs = [path for path in outputs if not path.is_relative_to(run.stage_dir(name))]
    files = len(kept) + sum(_files(path) for path in outputs)
    began = _began(run, name) if timed else []
    times = _times(entries, began, name, float(manifest["seconds"])) if timed else {}
    return Measured(
        units=units,
        inputs=manifest["inputs"],
        rows=manifest["rows"],
        shards=manifest["shards"],
        files=files,
        data=manifest["bytes"],
        beside=inside - manifest["bytes"],
        outputs=sum(size(path) for path in outputs),
        spread=_spread(chain, stage, manifest["rows"]),
        **times,
    )


def _files(path: Path) -> int:
    return sum(entry.is_file() for entry in path.rglob("*")) if path.is_dir() else 1


def _spread(chain: Chain, stage: Stage, rows: int) -> float:
    found = sidecars(chain.run.shards(stage.name)).values()
    rates = [item.bytes / item.inputs for item in found if item.inputs]
    if len(rates) < 3:
        among = _UNKNOWN_SPREAD if rates else 0.0
    else:
        among = statistics.stdev(rates) / statistics.fmean(rates) / math.sqrt(len(rates))
    # What a job keeps of what it reads is a count, as uncertain as its root.
    kept = 1 / rows if stage.kind == "job" and stage.inputs and rows else 0.0
    return math.sqrt(among**2 + kept)


def _began(run: RunDir, name: str) -> list[dict[str, Any]]:
    """How long each of a stage's processes took to get ready, as they noted it."""
    path = run.stage_dir(name) / "began.jsonl"
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):  # a line cut by a kill
            found.append(json.loads(line))
    return found


def _times(
    entries: list[dict[str, Any]], began: list[dict[str, Any]], name: str, span: float
) -> dict[str, Any]:
    """Seconds of a stage's processes, from what its jobs noted."""
    mine = [entry for entry in entries if entry.get("stage") == name]
    at_work = {entry["job"] for entry in began}
    ended = [
        entry
        for entry in mine
        if entry.get("event") == "ended"
        and entry.get("role") == "work"
        and (entry["job"] in at_work or not at_work)
    ]
    ready = statistics.fmean(entry["seconds"] for entry in began) if began else 0.0
    if not ended:  # a run on one machine: its processes live as long as the stage
        starts = max(len(began), 1)
        return {"seconds": span * starts, "ready": min(ready, span), "starts": starts}
    longest = max(entry["seconds"] for entry in ended)
    return {
        "seconds": float(sum(entry["seconds"] for entry in ended)),
        "ready": min(ready, float(longest)),
        "starts": len(ended),
        "gap": max(span - longest, 0.0),
    }


# ---- scaling


def extrapolate(
    chain: Chain,
    profile: Profile,
    measured: Mapping[str, Measured],
    units: Mapping[str, float],
    per_shard: int,
    source: str,
    timed: bool = True,
    models: float = 1.0,
) -> Forecast:
    """What a chain will take.

    Args:
        chain: The whole chain.
        profile: Where it will run.
        measured: Each of its stages (or one like it) in a smaller run.
        units: The work of each stage.
        per_shard: Most inputs a shard.
        source: Where the measurements are from, in words.
        timed: Whether their times hold for this cluster.
        models: How much larger the chain's models are than the measured ones.
    """
    found: dict[str, Expected] = {}
    for name, stage in chain.stages.items():
        source_shards = found[next(iter(stage.inputs.values()))].shards if stage.inputs else 0
        found[name] = _expected(
            stage, profile, measured[name], units[name], per_shard, source_shards, timed, models
        )
    stages = list(found.values())
    total = Range(0, 0, 0)
    hours = Range(0, 0, 0) if timed else None
    for item in stages:
        total += item.bytes
        if hours is not None and item.gpu_hours is not None:
            hours += item.gpu_hours
    return Forecast(source, stages, total, hours, _longest(chain, found) if timed else None)


def _expected(
    stage: Stage,
    profile: Profile,
    taken: Measured,
    units: float,
    per_shard: int,
    source_shards: int,
    timed: bool,
    models: float,
) -> Expected:
    asked = profile.of_stage(stage)
    ratio = units / taken.units if taken.units else 1.0
    shards = source_shards if stage.kind == "map" else 0
    if stage.kind == "job" and taken.shards:
        shards = math.ceil(round(taken.inputs * ratio, 6) / per_shard)
    workers = max(min(asked.workers, shards), 1) if stage.kind == "map" else 1
    nodes, tasks = (asked.nodes, asked.tasks) if stage.distributed else (1, 1)
    fixed = taken.outputs * (models if stage.resources == "gpu" else 1.0)  # results are none
    grown = _around(taken.data * ratio, taken.spread)
    beside = _around(taken.beside * ratio, taken.spread)
    expected = Expected(
        stage=stage.name,
        processes=workers * nodes * tasks,
        gpus=workers * nodes * asked.gpus,
        shards=shards,
        rows=round(taken.rows * ratio),
        files=2 * shards + max(taken.files - 2 * taken.shards, 0),
        data=grown,
        bytes=grown + beside + Range(fixed, fixed, fixed),
    )
    if not timed:
        return expected
    rest = max(taken.seconds - taken.ready * taken.starts, 0.0)
    doubt = math.hypot(taken.spread, 1 / max(rest, 1.0))
    work, ready = _around(rest * ratio, doubt), taken.ready
    hours = Range(*((x + ready * workers) * nodes * asked.gpus / 3600 for x in _three(work)))
    wall = Range(*(taken.gap + ready + x / workers for x in _three(work)))
    return Expected(**{**vars(expected), "gpu_hours": hours, "wall": wall})


def _around(value: float, spread: float) -> Range:
    return Range(value * max(1 - 2 * spread, 0.0), value, value * (1 + 2 * spread))


def _three(value: Range) -> tuple[float, float, float]:
    return value.low, value.mid, value.high


def _longest(chain: Chain, found: Mapping[str, Expected]) -> Range:
    """Seconds of the longest way through the chain, were there always room for its jobs."""
    ends: dict[str, Range] = {}
    for name, stage in chain.stages.items():
        wall = found[name].wall or Range(0, 0, 0)
        before = [ends[parent] for parent in stage.parents]
        ends[name] = wall + Range(
            *(max((getattr(end, part) for end in before), default=0.0) for part in _PARTS)
        )
    return Range(*(max((getattr(x, part) for x in ends.values()), default=0.0) for part in _PARTS))


_PARTS = ("low", "mid", "high")


# ---- keeping, and comparing


def path_of(run: RunDir) -> Path:
    """Where a run keeps its forecast."""
    return run.path / "forecast.json"


def keep(run: RunDir, forecast: Forecast) -> None:
    """Writes a forecast into the run it speaks of."""
    write_json(path_of(run), asdict(forecast))


def kept(run: RunDir) -> Forecast | None:
    """The forecast of a run, if it was rehearsed."""
    value = read_json(path_of(run))
    if value is None:
        return None
    stages = [Expected(**{key: _read(x) for key, x in item.items()}) for item in value["stages"]]
    whole = {key: _read(x) for key, x in value.items() if key not in ("source", "stages")}
    return Forecast(value["source"], stages, **whole)


def _read(value: Any) -> Any:
    return Range(**value) if isinstance(value, dict) else value


def compare(chain: Chain, forecast: Forecast) -> dict[str, dict[str, Any]]:
    """What came of each complete stage beside what was forecast.

    Returns:
        Stage to ``{"wall", "gpu_hours", "data"}``, each ``{"low", "mid", "high", "came"}``;
        times in seconds, data in bytes of shards.
    """
    used = by_stage(chain.run, spent(chain.run.read_jobs(), None, time.time()))
    found: dict[str, dict[str, Any]] = {}
    for expected in forecast.stages:
        if expected.stage not in chain.stages:
            continue
        manifest = chain.run.read_manifest(expected.stage)
        hours = used[expected.stage]["gpu"] if expected.stage in used else None
        pairs: list[tuple[str, Range | None, float | None]] = [
            ("wall", expected.wall, manifest["seconds"] if manifest else None),
            ("gpu_hours", expected.gpu_hours, hours if manifest else None),
            ("data", expected.data, manifest["bytes"] if manifest else None),
        ]
        found[expected.stage] = {
            what: asdict(within) | {"came": came} for what, within, came in pairs if within
        }
    return found
