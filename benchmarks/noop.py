"""A chain that does nothing: questions → copy, and a record of who was called for what.

As a program, in a folder that `prepare` has filled: ``noop.py work RUN copy`` and the other
payloads of `hpc.control`, ``noop.py submit RUN PROFILE``.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc import gates
from hpc.cluster import read_profile
from hpc.control import payload
from hpc.errors import UserError
from hpc.rundir import Chain, RunDir, read_json, write_json
from hpc.shards import write_groups
from hpc.stages import Context, Row, Stage
from hpc.submission import submit
from hpc.work import work


@dataclass(frozen=True)
class Shape:
    """Of the map.

    Attributes:
        shards: How many.
        keys: In a shard.
        pause: Seconds each key takes.
        workers: Most processes at once.
    """

    shards: int
    keys: int = 1
    pause: float = 0.0
    workers: int = 16


class Operations:
    """Counts what this process asks a file system by name, and its syncs, inside a folder.

    A listing counts as one; reading and writing open files does not count.
    """

    _BY_NAME = ("stat", "lstat", "open", "link", "unlink", "rename", "replace", "mkdir", "listdir")

    def __init__(self, folder: Path) -> None:
        self.found: Counter[str] = Counter()
        inside = f"{folder}/"
        for module, name in [*((os, name) for name in (*self._BY_NAME, "scandir")), (io, "open")]:
            setattr(module, name, self._counted(getattr(module, name), name, inside))
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            self.found["fsync"] += 1
            sync(descriptor)

        os.fsync = fsync

    def _counted(self, plain: Any, name: str, inside: str) -> Any:
        def counting(*words: Any, **named: Any) -> Any:
            if words and str(words[0]).startswith(inside):
                self.found[name] += 1
            return plain(*words, **named)

        return counting


class Copy:
    """Hands its rows on; tells at its end what it was called for, outside the run."""

    def __init__(self, folder: Path, pause: float) -> None:
        self.concurrency, self.folder, self.pause = 1, folder, pause
        self.calls: list[tuple[float, str]] = []

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        if self.pause:
            await asyncio.sleep(self.pause)
        self.calls.append((time.time(), key))
        return inputs["questions"]

    async def close(self) -> None:
        spent = os.times()
        told = {"calls": self.calls, "cpu": spent.user + spent.system}
        told["operations"] = operations.found if operations else {}
        name = f"{os.uname().nodename}-{os.getpid()}.json"
        (self.folder / name).write_text(json.dumps(told))


operations: Operations | None = None


def calls_folder(run: Path) -> Path:
    """Where workers tell what they were called for."""
    return run.with_name(f"{run.name}-calls")


def make(run: Path, shape: Shape) -> Chain:
    def write(context: Context) -> dict[str, Any]:
        keys = (f"n:{n}" for n in range(shape.shards * shape.keys))
        groups = ((key, [{"key": key, "text": "nothing to do"}]) for key in keys)
        return {"shards": write_groups(context.directory / "shards", groups, shape.keys)}

    def load(context: Context) -> Copy:
        return Copy(calls_folder(context.run), shape.pause)

    size = {"shards": shape.shards, "keys": shape.keys}
    over = {"questions": "questions"}
    stages = [
        Stage("questions", "job", config=size, run=write),
        Stage("copy", "map", over, load=load, workers=shape.workers),
    ]
    return Chain(stages, RunDir(run), [sys.executable, str(Path(__file__).resolve())])


def prepare(run: Path, shape: Shape) -> Chain:
    """Makes the input, so that only the map is left to do. Not synced: nothing is measured here."""
    sync, os.fsync = os.fsync, lambda descriptor: None
    try:
        return _prepare(run, shape)
    finally:
        os.fsync = sync


def _prepare(run: Path, shape: Shape) -> Chain:
    chain = make(run, shape)
    chain.run.create()
    write_json(run / "shape.json", asdict(shape))
    calls_folder(run).mkdir()
    gates.prepare(chain, "questions")
    assert work(chain, "questions") == gates.check(chain, "questions") == gates.DONE
    return chain


def reopen(run: Path) -> Chain:
    return make(run, Shape(**read_json(run / "shape.json")))


def main(words: Sequence[str]) -> int:
    command, run, *rest = words
    try:
        if command == "submit":
            submit(reopen(Path(run)), read_profile(Path(rest[0])))
            return 0
        if command == "work":
            global operations
            operations = Operations(Path(run) / "stages")
        return payload(reopen(Path(run)), [command, *rest])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
