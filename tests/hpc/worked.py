"""A torch-free map stage in a process of its own, for tests that kill it.

``python worked.py RUN [name=value …]``: the settings say how the mapper behaves, where the
process stops or kills itself, and the pace.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpc import shards
from hpc.errors import RecordError, UserError
from hpc.mapping import Pace
from hpc.rundir import Chain, RunDir
from hpc.shards import Limits, write_groups
from hpc.stages import Context, Row, Stage
from hpc.work import work

DEFAULTS = {
    "pause": 0.0,
    "concurrency": 3,
    "ttl": 60.0,
    "stall": 600.0,
    "linger": None,
    "dead": True,
    "keys": 2,
    "kill_at_call": -1,
    "kill_at": "",
    "hang_at": "",
    "user_error_at": "",
    "crash_at": "",
    "load_error": "",
    "hang_close": False,
}


class Count:
    """Two rows for even numbers, none for multiples of 3, failure for multiples of 7."""

    def __init__(self, context: Context, options: Mapping[str, object]) -> None:
        self.context, self.options = context, options
        self.concurrency = int(options["concurrency"])
        self.calls = 0
        self.flying = 0
        self.most = 0
        if options["load_error"] == "user":
            raise UserError("no such model; give another")
        with (context.directory / "loads").open("a") as file:
            file.write(f"{os.getpid()}\n")

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        self.calls += 1
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            if self.calls == self.options["kill_at_call"]:
                os.kill(os.getpid(), signal.SIGKILL)
            number = inputs["numbers"][0]["n"]
            # Uneven, so that outcomes come in another order than the inputs.
            await asyncio.sleep(float(self.options["pause"]) * (1 + number % 3))
            if key == self.options["hang_at"]:
                time.sleep(3600)
            if key == self.options["user_error_at"]:
                raise UserError(f"{key}: mend it")
            if key == self.options["crash_at"]:
                raise RuntimeError("out of luck")
            self.note(key)
            if number % 7 == 0:
                raise RecordError("a multiple of 7")
            if number % 3 == 0:
                return []
            return [{"n": number, "copy": copy, "text": "x" * 50} for copy in range(2 - number % 2)]
        finally:
            self.flying -= 1

    def note(self, key: str) -> None:
        with (self.context.directory / "called").open("a") as file:
            file.write(f"{key}\n")

    async def close(self) -> None:
        with (self.context.directory / "most").open("a") as file:
            file.write(f"{self.most}\n")
        if self.options["hang_close"]:
            await asyncio.sleep(3600)


def make(run: Path, options: Mapping[str, object] | None = None) -> Chain:
    settings = {**DEFAULTS, **(options or {})}

    def load(context: Context) -> Count:
        return Count(context, settings)

    stages = [
        Stage("numbers", "job", run=lambda context: None),
        Stage("count", "map", {"numbers": "numbers"}, load=load),
    ]
    return Chain(stages, RunDir(run), [sys.executable, __file__])


def prepare(run: Path, count: int, per_shard: int) -> Chain:
    chain = make(run)
    write_groups(chain.run.shards("numbers"), groups(count), per_shard)
    return chain


def groups(count: int) -> Iterator[tuple[str, list[Row]]]:
    return ((f"n:{n}", [{"n": n}]) for n in range(count))


def pace(options: Mapping[str, object]) -> Pace:
    settings = {**DEFAULTS, **options}
    asked = {name: settings[name] for name in ("ttl", "stall", "linger")}
    if not settings["dead"]:
        asked["dead"] = lambda owner: False
    return Pace(**asked, close=1.0, limits=Limits(keys=int(settings["keys"])))


def kill_at(place: str) -> None:
    """SIGKILL (or SIGSTOP) to itself just before a step of the commit."""
    step, _, how = place.partition(":")
    number = signal.SIGSTOP if how == "stop" else signal.SIGKILL
    if step == "sidecar":
        before = shards.write_sidecar

        def dying(*arguments: object, **named: object) -> None:
            os.kill(os.getpid(), number)
            before(*arguments, **named)

        shards.write_sidecar = dying
    elif step == "link":
        link = os.link

        def linking(source: Path, target: Path) -> None:
            if str(target).endswith(".jsonl.zst"):
                os.kill(os.getpid(), number)
            link(source, target)

        os.link = linking


def main(arguments: list[str]) -> int:
    run, *words = arguments
    options = dict(word.split("=", 1) for word in words)
    options = {
        name: value if isinstance(DEFAULTS[name], str) else json.loads(value)
        for name, value in options.items()
    }
    if options.get("kill_at"):
        kill_at(options["kill_at"])
    try:
        return work(make(Path(run), options), "count", pace(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
