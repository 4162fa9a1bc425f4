"""Finished stages of other runs, taken over instead of made again.

A stage is taken only if it would be fresh here as it stands there: the same hash, and made
from parents with the same ``made`` ids as those of this run. An id names one making of one
stage, so equal ids are equal contents all the way up; a chain of stages is taken over from
its roots on, until the first that differs. Files are hard links where the file system allows:
complete stages never change in place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import gates
from hpc.config import digest
from hpc.disk import disk_errors, make_folder, sync_folder
from hpc.errors import UserError
from hpc.provenance import describe
from hpc.rundir import Chain, RunDir, read_json, write_json
from hpc.shards import ShardError, shard_path, sidecars

# What belongs to the making of a stage, not to what was made.
_LEFT_BEHIND = ("leases", "progress", "logs", "checkpoints", "manifest.json", "missing.json")
_PATTERNS = ("*.part", "*.part.tmp", ".*.tmp")

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
_SKEW = 2.0  # seconds by which a file server's clock may be ahead


@dataclass(frozen=True)
class Reused:
    """What became of one stage that another run has.

    Attributes:
        stage: Its name.
        donor: The run that has it.
        problem: Why it was not taken over after all; empty if it was.
    """

    stage: str
    donor: Path
    problem: str = ""


class _Unfit(Exception):
    """The donor's files are not what its manifest says."""


def reuse(chain: Chain, donors: Sequence[Path], skip: Collection[str] = ()) -> Iterator[Reused]:
    """Takes over, in dependency order, what this run lacks and a donor has.

    Args:
        chain: The run that is to be made.
        donors: Other run directories; the first that has a stage gives it.
        skip: Stages to be made here in any case.

    Yields:
        Each stage that was taken over, or would have been but for damage.

    Raises:
        UserError: A donor is no run, or this run itself; this run is at work.
    """
    runs = [_donor(chain.run, path) for path in donors]
    with chain.run.lock():
        for left in (chain.run.path / "stages").glob(".reused-*"):
            shutil.rmtree(left)
        standing: set[str] = set()
        for name, stage in chain.stages.items():
            if not standing.issuperset(stage.parents):
                continue
            if gates.fresh(chain, name):
                standing.add(name)
                continue
            for donor in runs if name not in skip else ():
                manifest = donor.read_manifest(name)
                if manifest is None or not _same(chain, name, manifest):
                    continue
                try:
                    _take(chain, name, donor, manifest)
                except _Unfit as problem:
                    yield Reused(name, donor.path, str(problem))
                    continue
                standing.add(name)
                yield Reused(name, donor.path)
                break


def other_code(chain: Chain, donor: Path) -> bool:
    """Whether another version of the chain's packages has worked in a run; hashes do not tell."""
    here = {name: code["sources"] for name, code in describe(chain.packages)["code"].items()}
    starts = (read_json(RunDir(donor).provenance) or {}).get("starts", [])
    return any(
        start["code"].get(name, {}).get("sources") != sources
        for start in starts
        for name, sources in here.items()
    )


def _donor(run: RunDir, path: Path) -> RunDir:
    donor = RunDir(path)
    if not (donor.path / "stages").is_dir():
        raise UserError(f"{path} is no run directory: it has no stages; name a run to reuse")
    if run.path.exists() and donor.path.samefile(run.path):
        raise UserError(f"{path} is the run itself; name another run to reuse")
    return donor


def _same(chain: Chain, name: str, manifest: dict[str, Any]) -> bool:
    same = manifest["hash"] == chain.identity(name) and manifest["parents"] == chain.made(name)
    return same and not manifest.get("skipped")  # a decision lets it pass here, too, or does not


def _take(chain: Chain, name: str, donor: RunDir, manifest: dict[str, Any]) -> None:
    """Links a stage aside, checks it, and moves it into place; its folder's name comes last.

    Killed before that it leaves a stage without a folder, which is made from nothing.
    """
    run, outputs = chain.run, chain.stages[name].outputs
    aside = run.path / "stages" / f".reused-{uuid.uuid4().hex}"
    own = f"stages/{name}/"
    apart = {f"{n}": output for n, output in enumerate(outputs) if not output.startswith(own)}
    make_folder(aside)
    try:
        with disk_errors(aside):
            _link(donor.stage_dir(name), aside / name, manifest)
            for number, output in apart.items():
                _link(donor.path / output, aside / number, manifest)
        _verify(aside / name / "shards", manifest)
        for output in outputs:
            if output.startswith(own) and not (aside / output.removeprefix("stages/")).exists():
                raise _Unfit(f"{donor.path / output} is gone")
        if (donor.read_manifest(name) or {}).get("made") != manifest["made"]:
            raise _Unfit("it was made again meanwhile")
        write_json(aside / name / "manifest.json", {**manifest, "reused": str(donor.path)})
        run.remove(name, outputs)
        for number, output in apart.items():
            make_folder((run.path / output).parent)
            (aside / number).rename(run.path / output)
        (aside / name).rename(run.stage_dir(name))
        sync_folder(run.stage_dir(name).parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _link(source: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Links a file or a tree without what belongs to its making.

    Raises:
        _Unfit: Something is gone, or was written after the stage was complete.
    """

    def link(one: str, other: str) -> None:
        if os.lstat(one).st_mtime > manifest["finished"] + _SKEW:
            raise _Unfit(f"{one} was changed after the stage was complete")
        _link_file(one, other)

    def ignored(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == source
        return {*(_LEFT_BEHIND if top else ()), *shutil.ignore_patterns(*_PATTERNS)(folder, names)}

    try:
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, copy_function=link, ignore=ignored)
        else:
            link(str(source), str(target))
    except FileNotFoundError as error:
        raise _Unfit(f"{error.filename} is gone") from None


def _link_file(source: str, target: str) -> None:
    """A hard link; a durable copy where there can be none."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copy2(source, target, follow_symlinks=False)
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Checks every shard against its sidecar, and the sidecars against the manifest.

    Raises:
        _Unfit: They are not the same.
    """
    try:
        found = sidecars(folder)
        held = {str(index): sidecar.sha256 for index, sidecar in found.items()}
        if digest(held) != manifest["digest"]:
            raise _Unfit("its shards are not those of its manifest")
        for index, sidecar in found.items():
            with shard_path(folder, index).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sidecar.sha256:
                    raise _Unfit(f"shard {index:05d} is damaged")
    except FileNotFoundError as error:
        raise _Unfit(f"{Path(error.filename).name} is gone") from None
    except ShardError as error:
        raise _Unfit(str(error)) from None
