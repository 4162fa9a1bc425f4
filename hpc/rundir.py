"""The run directory, which is the state of a run, and the chain that works in it.

Nothing of a run stands anywhere else: no database, no server. Files that are read while
others write are replaced whole, so a reader sees the old or the new, never a half.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any

from hpc import locking
from hpc.config import digest
from hpc.disk import make_folder, write_atomic
from hpc.errors import UserError
from hpc.provenance import describe
from hpc.stages import Stage

CANCELLED = "CANCELLED"
STOPPED = "STOPPED"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")


class RunDir:
    """The paths of a run and the small files that hold its state.

    Args:
        path: ``runs/<name>``; made by `create`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()

    def create(self) -> None:
        """Makes the directory.

        Raises:
            UserError: It cannot be made or written.
        """
        try:
            (self.path / "stages").mkdir(parents=True, exist_ok=True)
            probe = self.path / f".{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot write a run here ({error.strerror}); "
                "give another --run-dir, or free it"
            ) from None

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    # ---- paths

    @property
    def models(self) -> Path:
        """Every checkpoint, one folder a model."""
        return self.path / "models"

    @property
    def chain_file(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.path / "chain.yaml"

    @property
    def provenance(self) -> Path:
        """Which code, packages and host made the run; one entry for each start."""
        return self.path / "provenance.json"

    @property
    def jobs(self) -> Path:
        """Every job that was ever submitted, one JSON object a line."""
        return self.path / "jobs.jsonl"

    @property
    def results(self) -> Path:
        """``results.json``."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The folder of the page."""
        return self.path / "report"

    def stage_dir(self, stage: str) -> Path:
        """A stage's own folder."""
        return self.path / "stages" / stage

    def shards(self, stage: str) -> Path:
        """The folder of a stage's shards and sidecars."""
        return self.stage_dir(stage) / "shards"

    def leases(self, stage: str) -> Path:
        """The folder of a stage's leases."""
        return self.stage_dir(stage) / "leases"

    def logs(self, stage: str) -> Path:
        """The folder of what a stage's jobs printed."""
        return self.stage_dir(stage) / "logs"

    def progress(self, stage: str) -> Path:
        """The folder in which a stage's workers tell how far they are, one file each."""
        return self.stage_dir(stage) / "progress"

    def manifest(self, stage: str) -> Path:
        """Written by the gate: the stage is complete."""
        return self.stage_dir(stage) / "manifest.json"

    def started(self, stage: str) -> Path:
        """Written before the first job: which config and inputs the folder's work belongs to."""
        return self.stage_dir(stage) / "stage.json"

    def counts(self, stage: str) -> Path:
        """Written by a job stage's payload at its end: its counts."""
        return self.stage_dir(stage) / "counts.json"

    def missing(self, stage: str) -> Path:
        """Written by the gate: the indices of shards that are not there."""
        return self.stage_dir(stage) / "missing.json"

    # ---- markers

    def mark(self, marker: str, reason: str = "") -> None:
        """Sets a marker (`CANCELLED`, `STOPPED`) with its reason."""
        write_atomic(self.path / marker, reason + "\n")

    def marked(self, marker: str) -> str | None:
        """The reason of a marker, or None where it is not set."""
        try:
            return (self.path / marker).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def unmark(self, *markers: str) -> None:
        """Takes markers away."""
        for marker in markers:
            (self.path / marker).unlink(missing_ok=True)

    # ---- records

    def read_manifest(self, stage: str) -> dict[str, Any] | None:
        """A stage's manifest, or None while it is not complete.

        Raises:
            UserError: What is there is no manifest.
        """
        return read_json(self.manifest(stage))

    def add_job(self, **entry: Any) -> None:
        """Appends a line to ``jobs.jsonl``; one write, so that lines never mix."""
        line = json.dumps({"time": time.time(), **entry}, ensure_ascii=False) + "\n"
        descriptor = os.open(self.jobs, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read_jobs(self) -> list[dict[str, Any]]:
        """The lines of ``jobs.jsonl``; one cut by a crash or a full disk is left out."""
        if not self.jobs.exists():
            return []
        entries = []
        for line in self.jobs.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                # What was cut has no end: the next line stands behind it.
                entries.append(json.loads(line[max(line.rfind('{"time"'), 0) :]))
            except ValueError:
                continue
        return [entry for entry in entries if isinstance(entry, dict)]

    def add_provenance(
        self,
        packages: Sequence[str] = ("hpc",),
        image: Mapping[str, Any] | None = None,
        images: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Records what is about to work in this run, unless the last start was the same.

        Args:
            packages: Whose code.
            image: What the payloads run in, where this process does not.
            images: By stage, where that runs in another.
        """
        entry = describe(packages)
        entry["image"] = image or entry["image"]
        if images:
            entry["images"] = dict(images)
        entries = (read_json(self.provenance) or {}).get("starts", [])
        fixed = ("code", "python", "packages", "image", "images")
        if entries and all(entries[-1].get(name) == entry.get(name) for name in fixed):
            return
        write_json(self.provenance, {"starts": [*entries, entry]})

    def image(self) -> dict[str, Any] | None:
        """The image of the last start; None where that had none, or there was no start."""
        found: dict[str, Any] | None = self._last_start().get("image")
        return found

    def _last_start(self) -> dict[str, Any]:
        starts = (read_json(self.provenance) or {}).get("starts", [])
        return starts[-1] if starts else {}

    def refuse_other_image(
        self,
        image: Mapping[str, Any] | None,
        images: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Refuses to go on with a stage in another image than it was begun in.

        Args:
            image: What payloads run in now.
            images: By stage, where that runs in another.

        Raises:
            UserError: It is another, or one of the two is none.
        """
        known = self._last_start()
        for begun in sorted((self.path / "stages").glob("*/stage.json")):
            stage = begun.parent.name
            first = known.get("images", {}).get(stage, known.get("image"))
            second = (images or {}).get(stage, image)
            before, now = ((one or {}).get("sha256") for one in (first, second))
            if before != now:
                raise UserError(
                    f"{self.path}: {stage} was begun in {_shown(before)}, this is {_shown(now)}; "
                    "put the former in place, or say --other-image to go on with this one"
                )

    def remove(self, stage: str, outputs: Iterable[str] = ()) -> None:
        """Removes a stage's folder and outputs, so that it is made again.

        Killed in the middle it leaves a stage that is not complete: the outputs go first,
        then the folder leaves its name in one step.
        """
        self.remove_outputs(outputs)
        folder = self.stage_dir(stage)
        with suppress(FileNotFoundError):  # never there, or another has just removed it
            folder.rename(folder.with_name(f".removed-{uuid.uuid4().hex}"))
        for left in folder.parent.glob(".removed-*"):
            shutil.rmtree(left, ignore_errors=True)

    def remove_outputs(self, outputs: Iterable[str]) -> None:
        """Removes what a stage left outside of its folder."""
        for output in outputs:
            path = self.path / output
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def locked(self) -> bool:
        """Whether a driver, or a worker it left behind, is at work here now."""
        return locking.locked(self.path / "driver.lock")

    def lock(self, patience: float = 60.0) -> AbstractContextManager[int]:
        """Holds the run, so that only one driver works in it; see `hpc.locking.hold`."""
        return locking.hold(self.path / "driver.lock", patience)


@dataclass(init=False)
class Chain:
    """Stages in dependency order, the directory they work in, the command of their jobs.

    Attributes:
        stages: Name to stage, parents before children.
        run: The run directory.
        command: The program; a job is ``*command work RUN STAGE``.
        packages: Whose code is recorded as the run's.
        reads: Folders outside of the run that payloads read.
        image: Path and digest of the image that payloads run in; None: as this process does.
        images: By stage, where that runs in another.

    Raises:
        UserError: A bad or doubled name, an unknown parent, a circle, a stage without payload.
    """

    stages: dict[str, Stage]
    run: RunDir
    command: list[str]
    packages: tuple[str, ...]
    reads: tuple[Path, ...]
    image: dict[str, Any] | None
    images: dict[str, dict[str, Any]]

    def __init__(
        self,
        stages: Iterable[Stage] | Mapping[str, Stage],
        run: RunDir | Path | str,
        command: Sequence[str],
        packages: Sequence[str] = ("hpc",),
        reads: Sequence[Path] = (),
    ) -> None:
        listed = list(stages.values() if isinstance(stages, Mapping) else stages)
        self.stages = _in_order(listed)
        self.run = run if isinstance(run, RunDir) else RunDir(run)
        self.command = list(command)
        self.packages = tuple(packages)
        self.reads = tuple(reads)
        self.image = None
        self.images = {}

    def image_of(self, stage: str) -> dict[str, Any] | None:
        """Path and digest of the image that a stage runs in; None: as this process does."""
        return self.images.get(stage, self.image)

    def identity(self, stage: str) -> str:
        """The hash of everything in a stage that shapes its result, inputs by name."""
        described = self.stages[stage]
        return digest(
            {
                "name": described.name,
                "kind": described.kind,
                "inputs": dict(described.inputs),
                "after": sorted(described.after),
                "config": described.config,
            }
        )

    def made(self, stage: str) -> dict[str, str | None]:
        """Each parent's ``made`` id, as its manifest has it now; None while it is incomplete."""
        parents = self.stages[stage].parents
        return {parent: (self.run.read_manifest(parent) or {}).get("made") for parent in parents}

    def dependents(self, stage: str) -> list[str]:
        """Every stage that needs this one, however far behind it."""
        found = {stage}
        for name, other in self.stages.items():
            if found.intersection(other.parents):
                found.add(name)
        return [name for name in self.stages if name in found and name != stage]


def _shown(digest: str | None) -> str:
    return f"the image {digest[:16]}…" if digest else "no image"


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file whole; its folder is made."""
    make_folder(path.parent)
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file's object, or None where there is no such file.

    Raises:
        UserError: The file is there and holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete it to make it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: no JSON object; delete it to make it again")
    return value


def _in_order(stages: Sequence[Stage]) -> dict[str, Stage]:
    named: dict[str, Stage] = {}
    for stage in stages:
        if not _NAME.fullmatch(stage.name):
            raise UserError(f"stage {stage.name!r}: a name is letters, digits and dashes")
        if stage.name in named:
            raise UserError(f"stage {stage.name}: named twice in the chain; rename one")
        named[stage.name] = stage
    for stage in stages:
        for parent in (*stage.parents, *stage.unless):
            if parent not in named:
                raise UserError(f"stage {stage.name}: needs {parent}, which is not in the chain")
        _check_payload(stage)
        _check_decisions(stage, named)
    before = {stage.name: (*stage.parents, *stage.unless) for stage in stages}
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise UserError(f"stages wait for each other: {' → '.join(error.args[1])}") from None
    return {name: named[name] for name in order}


def _check_decisions(stage: Stage, named: Mapping[str, Stage]) -> None:
    """Whatever reads the shards of a stage that may be passed over must pass with it."""
    for name in stage.unless:
        if named[name].kind != "job":
            raise UserError(f"stage {stage.name}: {name} cannot decide on it; only a job can")
    for name in stage.inputs.values():
        if lacking := set(named[name].unless) - set(stage.unless):
            raise UserError(
                f"stage {stage.name}: reads {name}, which {min(lacking)} may pass over; "
                "name that in its `unless`, too"
            )


def _check_payload(stage: Stage) -> None:
    if stage.kind not in ("map", "job"):
        raise UserError(f"stage {stage.name}: kind {stage.kind!r}; use map or job")
    if stage.kind == "map" and (stage.load is None or not stage.inputs):
        raise UserError(f"stage {stage.name}: a map needs `load` and at least one input")
    if stage.kind == "job" and stage.run is None:
        raise UserError(f"stage {stage.name}: a job needs `run`")
    for output in stage.outputs:
        path = PurePosixPath(output)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UserError(f"stage {stage.name}: output {output!r} leaves the run directory")
