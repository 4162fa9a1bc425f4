"""What of a run may be deleted: everything that can be missed, never the data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc import gates
from hpc.errors import UserError
from hpc.rundir import Chain


@dataclass(frozen=True)
class Removable:
    """Something that may go.

    Attributes:
        stage: Whose it is; empty for what belongs to the run.
        what: ``parts``, ``leases``, ``progress``, ``logs``, ``checkpoints``, ``shards`` or
            ``removed``.
        path: A file or a folder.
        bytes: How much room it takes.
    """

    stage: str
    what: str
    path: Path
    bytes: int


def clean(
    chain: Chain, plan: bool = True, logs: bool = False, data: bool = False
) -> list[Removable]:
    """Deletes what a run no longer needs, or only lists it.

    From complete stages: parts, files a kill left half written, leases, progress, the folders
    of intermediate checkpoints (``checkpoints`` beside a stage's outputs or in its own folder).
    What an interrupted removal left behind goes as well. Stages that are not complete keep
    everything, since they resume from it.

    Args:
        chain: The run.
        plan: Only list; delete nothing.
        logs: Logs of complete stages too.
        data: Shards of complete stages too, where every stage that reads them is complete:
            the run can then no longer be gone on with.

    Returns:
        What was, or would be, deleted.

    Raises:
        UserError: The run is at work.
    """
    run = chain.run
    if not plan and run.locked():
        raise UserError(f"{run.path}: the chain is at work here; clean it when it is done")
    found = list(_removable(chain, logs, data))
    if not plan:
        for item in found:
            if item.path.is_dir() and not item.path.is_symlink():
                shutil.rmtree(item.path)
            else:
                item.path.unlink(missing_ok=True)
    return found


def _removable(chain: Chain, logs: bool, data: bool) -> Iterator[Removable]:
    run = chain.run
    for pattern in (".removed-*", ".reused-*"):
        for left in sorted((run.path / "stages").glob(pattern)):
            yield Removable("", "removed", left, size(left))
    standing = gates.standing(chain)
    for name, stage in chain.stages.items():
        if not standing[name]:
            continue
        # A kill between the writing of a file and its renaming leaves `.<name>.<hex>.tmp`.
        parts = [*run.shards(name).glob("*.part*"), *run.shards(name).glob(".*.tmp")]
        for part in sorted([*parts, *run.stage_dir(name).glob(".*.tmp")]):
            yield Removable(name, "parts", part, size(part))
        folders = [("leases", run.leases(name)), ("progress", run.progress(name))]
        folders += [("checkpoints", run.stage_dir(name) / "checkpoints")]
        folders += [("checkpoints", run.path / out / "checkpoints") for out in stage.outputs]
        if logs:
            folders.append(("logs", run.logs(name)))
        if data and all(standing[other] for other in chain.dependents(name)):
            folders.append(("shards", run.shards(name)))
        for what, folder in folders:
            if folder.is_dir() and any(folder.iterdir()):
                yield Removable(name, what, folder, size(folder))


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir())
