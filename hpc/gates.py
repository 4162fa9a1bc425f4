"""Gates: is a stage complete, what is missing, and the manifest that says it is done.

A stage is *fresh* while its manifest speaks of the present configuration, of its parents as
they are now, and everything it made is still there. Whatever is not fresh is made again.

A stage that a decision lets pass (`Stage.unless`) is fresh with a manifest that says so, as long
as that decision stands.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc.config import digest, shaping
from hpc.decisions import decision, manifest_of, rests_on, skipped_by
from hpc.disk import make_folder
from hpc.errors import UserError
from hpc.provenance import image
from hpc.rundir import STOPPED, Chain, read_json, write_json
from hpc.shards import (
    Sidecar,
    list_folder,
    read_entries,
    shard_path,
    sidecar_path,
    sidecars,
)
from hpc.stages import Stage

DONE = 0
REQUEUE = 75
RETRY = 76
STOP = 77
SPARE = 78

# Network file systems remember for some seconds that a name was absent.
_SECOND_LOOK = 1.0
_TRIES = 10


def fresh(chain: Chain, name: str) -> bool:
    """Whether a stage is complete and nothing it depends on has changed since.

    Raises:
        UserError: Its manifest is none.
    """
    manifest = manifest_of(chain.run, name)
    return manifest is not None and not outdated(chain, name, manifest)


def outdated(chain: Chain, name: str, manifest: Mapping[str, Any]) -> str:
    """Why a finished stage has to be made again; empty where it does not."""
    stage = chain.stages[name]
    if manifest["hash"] != chain.identity(name):
        changed = differences(manifest["config"], shaping(stage.config))
        return f"configuration changed ({changed[0] if changed else 'its inputs'})"
    if skipped := manifest.get("skipped"):
        by = skipped["by"]
        found = decision(chain, by) if by in stage.unless else None
        stands = found is not None and found["made"] == skipped["made"]
        return "" if stands else f"{by} decides anew"
    made = chain.made(name)
    if changed := [parent for parent in made if made[parent] != manifest["parents"].get(parent)]:
        return f"{changed[0]} {'was made again' if made[changed[0]] else 'is missing'}"
    if absent := _absent(chain, name, range(manifest["shards"])):
        return f"{shard_path(chain.run.shards(name), absent[0]).name} is missing"
    if lost := _absent_outputs(chain, stage):
        return f"{lost[0]} is missing"
    return "" if made.keys() == manifest["parents"].keys() else "it has other parents"


def standing(chain: Chain) -> dict[str, bool]:
    """Every stage's freshness; a stage behind one that is not fresh is not fresh either."""
    found: dict[str, bool] = {}
    for name in chain.stages:
        found[name] = all(found[other] for other in rests_on(chain, name)) and fresh(chain, name)
    return found


def withdraw(chain: Chain) -> None:
    """Takes back decisions that are outdated, before anything rests on them."""
    deciding = {other for stage in chain.stages.values() for other in stage.unless}
    for name, complete in standing(chain).items() if deciding else ():
        if name in deciding and not complete:
            chain.run.manifest(name).unlink(missing_ok=True)


def pass_over(chain: Chain) -> None:
    """Commits every stage that a decision lets pass; nobody may be at work on any of them."""
    for name in chain.stages:
        if skipped_by(chain, name) is not None and not fresh(chain, name):
            check(chain, name)


def refuse_changes(chain: Chain) -> None:
    """Refuses to mix the work of two configurations in one run directory.

    Raises:
        UserError: A stage has finished work of another configuration.
    """
    run = chain.run
    for name, stage in chain.stages.items():
        kept = manifest_of(run, name) or read_json(run.started(name))
        if kept is None or kept["hash"] == chain.identity(name) or kept.get("skipped"):
            continue
        if not run.manifest(name).exists() and not list_folder(run.shards(name)).complete:
            continue  # nothing was finished under the other configuration
        changed = "; ".join(differences(kept["config"], shaping(stage.config))[:5])
        raise UserError(
            f"{run.path}: stage {name} was made with another configuration "
            f"({changed or 'its inputs changed'}); use another run directory, "
            "or --remake to make it and what depends on it again"
        )


def prepare(chain: Chain, name: str) -> None:
    """Makes a stage's folder ready for its first job, keeping unfinished work that fits.

    Work that belongs to another configuration or to other inputs is removed;
    `refuse_changes` comes before. All parents must be complete. The gates of two parents may
    prepare one stage at once: whoever finds a folder taken away by the other begins anew.
    """
    for left in reversed(range(_TRIES)):
        try:
            _prepare(chain, name)
            return
        except (FileNotFoundError, UserError) as error:
            # A folder that was there and is gone once one looks is refused as existing.
            taken = isinstance(error.__cause__ or error, FileNotFoundError | FileExistsError)
            if not left or not taken:
                raise
            time.sleep(random.uniform(0.05, 0.2))


def _prepare(chain: Chain, name: str) -> None:
    stage, run = chain.stages[name], chain.run
    identity, parents = chain.identity(name), chain.made(name)
    begun = read_json(run.started(name)) or {}
    # A manifest here belongs to a stage that lost its outputs or whose parents were remade.
    stale = run.manifest(name).exists()
    if stale or begun.get("hash") != identity or begun.get("parents") != parents:
        run.remove(name, stage.outputs)
        begun = {}
    now = time.time()
    record = {
        "stage": name,
        "hash": identity,
        "parents": parents,
        "config": shaping(stage.config),
        "started": begun.get("started", now),
        "since": now,
        "spent": begun.get("spent", 0.0) + _worked(chain, name, begun),
    }
    for folder in (run.shards(name), run.leases(name), run.logs(name), run.progress(name)):
        make_folder(folder)
    _forget_failures(chain, name)
    write_json(run.started(name), record)


def missing(chain: Chain, name: str) -> list[int]:
    """Indices of the shards a map stage still has to make; a job's are not known before."""
    return _absent(chain, name, _expected(chain, chain.stages[name]))


def too_many_errors(chain: Chain, name: str) -> str:
    """Why a stage is hopeless by its number of failed inputs; empty while it is not."""
    stage, run = chain.stages[name], chain.run
    found = sidecars(run.shards(name))
    failed = sum(sidecar.errors for sidecar in found.values())
    if not failed:
        return ""
    first = next(iter(stage.inputs.values()), "")
    source = run.read_manifest(first) if stage.kind == "map" else None
    inputs = source["inputs"] if source else sum(item.inputs for item in found.values())
    if failed <= stage.error_limit * inputs:
        return ""
    reasons = Counter(
        entry.error
        for index, sidecar in found.items()
        if sidecar.errors
        for entry in read_entries(shard_path(run.shards(name), index))
        if entry.error
    )
    common = "; ".join(f"{count} × {_short(reason)}" for reason, count in reasons.most_common(3))
    return (
        f"stage {name}: {failed} of {inputs} inputs failed, more than its limit of "
        f"{stage.error_limit:.1%} ({common})"
    )


def _forget_failures(chain: Chain, name: str) -> None:
    """Removes the shards with errors of a stage that failed by their number: another try."""
    if not too_many_errors(chain, name):
        return
    for index, sidecar in sidecars(chain.run.shards(name)).items():
        if sidecar.errors:
            shard = shard_path(chain.run.shards(name), index)
            sidecar_path(shard).unlink()
            shard.unlink(missing_ok=True)


def check(chain: Chain, name: str) -> int:
    """The gate at the end of a stage: commits its manifest if all is there.

    Returns:
        0: complete, or let pass by a decision; the manifest is written.
        76: something is missing; its shards' indices stand in ``missing.json``.
        77: hopeless (too many errors); the reason stands in the run directory.
    """
    stage, run = chain.stages[name], chain.run
    if skipped := skipped_by(chain, name):
        _pass(chain, stage, skipped)
        return DONE
    expected = _expected(chain, stage)
    absent = _absent(chain, name, expected)
    lost = _absent_outputs(chain, stage)
    counts = read_json(run.counts(name)) if stage.kind == "job" else {}
    if absent or lost or counts is None:
        time.sleep(_SECOND_LOOK)
        absent = _absent(chain, name, expected)
        lost = _absent_outputs(chain, stage)
        counts = read_json(run.counts(name)) if stage.kind == "job" else {}
    if absent or lost or counts is None:
        for index in absent:
            # A sidecar whose shard is gone marks nothing; left there, nobody would remake it.
            sidecar_path(shard_path(run.shards(name), index)).unlink(missing_ok=True)
        if stage.kind == "job":
            run.counts(name).unlink(missing_ok=True)
        write_json(run.missing(name), {"shards": absent, "outputs": lost})
        return RETRY
    run.missing(name).unlink(missing_ok=True)
    found = sidecars(run.shards(name))
    if stage.kind == "map" and (strange := _unaligned(chain, stage, found)):
        run.mark(STOPPED, strange)
        return STOP
    if reason := too_many_errors(chain, name):
        run.mark(STOPPED, reason)
        return STOP
    _commit(chain, stage, found, counts)
    return DONE


def describe_missing(chain: Chain, name: str) -> str:
    """What a gate missed, in words."""
    missing = read_json(chain.run.missing(name)) or {}
    parts = []
    if shards := missing.get("shards"):
        shown = ", ".join(f"{index:05d}" for index in shards[:5])
        parts.append(f"{len(shards)} shards missing ({shown}{', …' if len(shards) > 5 else ''})")
    if outputs := missing.get("outputs"):
        parts.append(f"{', '.join(outputs)} missing")
    return "; ".join(parts) or "its job did not finish"


def _commit(
    chain: Chain, stage: Stage, found: Mapping[int, Sidecar], counts: Mapping[str, Any]
) -> None:
    write_json(
        chain.run.manifest(stage.name),
        _head(chain, stage)
        | {
            "shards": len(found),
            "inputs": sum(sidecar.inputs for sidecar in found.values()),
            "rows": sum(sidecar.rows for sidecar in found.values()),
            "errors": sum(sidecar.errors for sidecar in found.values()),
            "bytes": sum(sidecar.bytes for sidecar in found.values()),
            "digest": digest({str(index): found[index].sha256 for index in sorted(found)}),
            "counts": dict(counts),
            "sums": _sums(stage, found, counts),
            "outputs": list(stage.outputs),
        },
    )


def _sums(stage: Stage, found: Mapping[int, Sidecar], counts: Mapping[str, Any]) -> dict[str, int]:
    if stage.kind == "job":
        return {name: int(counts[name]) for name in stage.counted if name in counts}
    return add_sums(found.values())


def add_sums(found: Iterable[Sidecar]) -> dict[str, int]:
    """What sidecars have summed up, all together."""
    total: Counter[str] = Counter()
    for sidecar in found:
        total.update(sidecar.sums)
    return dict(total)


def _pass(chain: Chain, stage: Stage, skipped: Mapping[str, str]) -> None:
    """Commits a stage that is not needed; what it had begun counts for nothing."""
    run = chain.run
    run.missing(stage.name).unlink(missing_ok=True)
    run.remove_outputs(stage.outputs)
    nothing = dict.fromkeys(("shards", "inputs", "rows", "errors", "bytes"), 0)
    rest = {"digest": digest({}), "counts": {}, "outputs": [], "skipped": dict(skipped)}
    write_json(run.manifest(stage.name), _head(chain, stage) | nothing | rest)


def _head(chain: Chain, stage: Stage) -> dict[str, Any]:
    """What a manifest says of the making, whatever came of it."""
    begun, now = read_json(chain.run.started(stage.name)) or {}, time.time()
    return {
        "stage": stage.name,
        "kind": stage.kind,
        "hash": chain.identity(stage.name),
        # A new id each time: whatever was made from the former one is stale.
        "made": uuid.uuid4().hex,
        "parents": chain.made(stage.name),
        "config": shaping(stage.config),
        "image": (chain.image_of(stage.name) or image() or {}).get("sha256"),
        "started": begun.get("started", now),
        "finished": now,
        "seconds": round(begun.get("spent", 0.0) + now - begun.get("since", now), 3),
    }


def _expected(chain: Chain, stage: Stage) -> range:
    """The indices of the shards a stage must have."""
    if stage.kind == "map":
        first = next(iter(stage.inputs.values()))
        manifest = chain.run.read_manifest(first)
        if manifest is None:
            raise UserError(f"stage {stage.name}: its input {first} is not complete; run it first")
        return range(manifest["shards"])
    # A job's own shards are numbered from 0 without gaps; it says by its counts that it ended.
    found = sidecars(chain.run.shards(stage.name))
    return range(max(found, default=-1) + 1)


def _unaligned(chain: Chain, stage: Stage, found: Mapping[int, Sidecar]) -> str:
    """Says which shard does not hold the keys of its input's shard, if any."""
    first = next(iter(stage.inputs.values()))
    inputs = sidecars(chain.run.shards(first))
    for index, sidecar in found.items():
        if index not in inputs or inputs[index].keys != sidecar.keys:
            path = shard_path(chain.run.shards(stage.name), index)
            return f"{path}: holds other keys than its input in {first}; delete it and retry"
    return ""


def _absent(chain: Chain, name: str, expected: Iterable[int]) -> list[int]:
    """Indices whose shard or sidecar is not there, asked for by name."""
    folder = chain.run.shards(name)
    listed = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    absent = []
    for index in expected:
        shard = shard_path(folder, index)
        names = (shard, sidecar_path(shard))
        if not all(path.name in listed or path.exists() for path in names):
            absent.append(index)
    return absent


def _absent_outputs(chain: Chain, stage: Stage) -> list[str]:
    return [output for output in stage.outputs if not _there(chain.run.path / output)]


def _there(path: Path) -> bool:
    """Whether an output exists; an emptied folder does not count."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The dotted keys in which two configurations differ, as ``key: old → new``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    if digest(old) == digest(new):
        return []
    return [f"{prefix[:-1]}: {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _worked(chain: Chain, name: str, begun: Mapping[str, Any]) -> float:
    """Seconds an interrupted stage was at work, up to the last sign of life."""
    if "since" not in begun:
        return 0.0
    folders = (chain.run.progress(name), chain.run.shards(name))
    signs = [path.stat().st_mtime for folder in folders for path in folder.glob("*")]
    return float(max(0.0, max(signs, default=0.0) - begun["since"]))
