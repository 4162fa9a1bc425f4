"""What a payload is given: its place in the run, a way to tell its progress, and signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from hpc.decisions import skipped_by
from hpc.disk import make_folder, write_atomic
from hpc.errors import UserError
from hpc.gates import DONE, REQUEUE, STOP
from hpc.leases import Owner, gone
from hpc.rundir import CANCELLED, Chain
from hpc.stages import Stage

# A file a second and worker is what a network file system takes without a groan.
_TELL_SECONDS = 1.0
_LOOK_SECONDS = 1.0

_STATUS = {
    signal.SIGUSR1: REQUEUE,
    signal.SIGUSR2: REQUEUE,
    signal.SIGTERM: 128 + signal.SIGTERM,
    signal.SIGINT: 128 + signal.SIGINT,
}


class Signals:
    """What this process was asked by signals, the run's CANCELLED marker, and a decision.

    A decision that lets the stage pass ends its work, as if it were complete (0).
    USR1 and USR2 announce the time limit: the payload saves and asks to be queued again
    (75). TERM and INT mean save and leave (143, 130) and overrule them, for whoever queues
    a cancelled job again undoes the cancelling. Further signals change nothing.
    """

    def __init__(self, chain: Chain, stage: Stage) -> None:
        """Nothing was asked so far."""
        self._chain, self._stage = chain, stage
        self._signal: signal.Signals | None = None
        self._looked = -_LOOK_SECONDS
        self._found: int | None = None

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catches the signals meanwhile, where this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._catch) for number in _STATUS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def status(self) -> int | None:
        """The exit status of a payload that leaves because it was asked to; None if it was not."""
        now = time.monotonic()
        if self._found != STOP and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._found = self._look()
        if self._found is not None:
            return self._found
        return None if self._signal is None else _STATUS[self._signal]

    def _look(self) -> int | None:
        if self._chain.run.marked(CANCELLED) is not None:
            return STOP
        passed = self._stage.unless and skipped_by(self._chain, self._stage.name)
        return DONE if passed else None

    def _catch(self, number: int, frame: FrameType | None) -> None:
        caught = signal.Signals(number)
        if self._signal is None or _STATUS[self._signal] == REQUEUE:
            self._signal = caught


class RunContext:
    """The `Context` of a stage's payload.

    Attributes:
        run: The run directory.
        directory: The stage's own directory.
        moved: When the payload last told progress, or began, on the monotonic clock.
        lead: Whether this process speaks for its job: the first of a distributed job's ranks.
    """

    def __init__(self, chain: Chain, stage: Stage, signals: Signals) -> None:
        """Makes the stage's folder for progress and removes what dead workers told there."""
        self.run = chain.run.path
        self.directory = chain.run.stage_dir(stage.name)
        self.owner = Owner.here(_job_id())
        self._chain, self._stage, self._signals = chain, stage, signals
        self.lead = not stage.distributed or int(os.environ.get("RANK", "0")) == 0
        self._numbers: dict[str, float] = {}
        self._told = -_TELL_SECONDS
        self.moved = self._made = time.monotonic()
        self._ready = False
        folder = make_folder(chain.run.progress(stage.name))
        self._file = folder / f"{socket.gethostname()}-{os.getpid()}.json"
        _remove_dead(folder)

    def shards(self, role: str) -> Path:
        """The shard folder of the input stage bound to ``role``."""
        if role not in self._stage.inputs:
            known = ", ".join(self._stage.inputs) or "none"
            raise UserError(f"stage {self._stage.name}: no input {role!r}; it has: {known}")
        return self._chain.run.shards(self._stage.inputs[role])

    def progress(self, done: int, total: int, **numbers: float) -> None:
        """Tells how far the payload is.

        Of a map stage's payload only the numbers are kept: its worker knows the rest. Of the
        ranks of a job the first one is heard.
        """
        self._numbers.update(numbers)
        self.moved = time.monotonic()
        if self._stage.kind == "job" and self.lead:
            self.ready()
            self.tell(done, total)

    def ready(self) -> None:
        """Notes, once, how long the payload took until it could begin: a forecast needs it."""
        if self._ready or not self.lead:
            return
        self._ready = True
        took = {"job": self.owner.job, "seconds": round(time.monotonic() - self._made, 2)}
        with suppress(OSError), (self.directory / "began.jsonl").open("a") as file:
            file.write(json.dumps(took) + "\n")

    def tell(self, done: int, total: int) -> None:
        """Writes the progress file, at most once a second but for the last step.

        Args:
            done: Inputs or steps.
            total: Of how many; 0 where that is not known.
        """
        now = time.monotonic()
        if now - self._told < _TELL_SECONDS and not 0 < total <= done:
            return
        self._told = now
        told = {"done": done, "total": total, "numbers": self._numbers, "time": time.time()}
        # Nobody loses work for the sake of a bar.
        with suppress(UserError, OSError):
            write_atomic(self._file, json.dumps(told | {"owner": asdict(self.owner)}), False, False)

    def hush(self) -> None:
        """Removes the progress file: what it told is in the shards, or void."""
        self._file.unlink(missing_ok=True)

    def stopping(self) -> bool:
        """Whether a signal, or the run's cancelling, asks the payload to save and leave."""
        return self._signals.status() is not None


def _job_id() -> str:
    """The batch job this process belongs to, as the scheduler names it to its jobs."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _remove_dead(folder: Path) -> None:
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if gone(Owner(**json.loads(path.read_bytes())["owner"])):
                path.unlink()
