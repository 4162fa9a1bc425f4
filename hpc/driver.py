"""Runs a chain on an executor until it is complete.

The driver holds no state that matters: what is done stands in the run directory, and a
driver started again goes on from there.
"""

from __future__ import annotations

import itertools
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from hpc import gates
from hpc.decisions import rests_on, skipped_by
from hpc.errors import UserError
from hpc.executors.base import Executor, Job, State
from hpc.executors.local import cores
from hpc.logs import last_line
from hpc.provenance import image
from hpc.rundir import CANCELLED, STOPPED, Chain
from hpc.stages import Stage
from hpc.status import Advance, advance

_POLL = 0.05
_REPORT = 0.5  # seconds between looks at the progress of a stage
_WINDOW = 30.0  # seconds a rate is taken over
_GRACE = 60.0  # seconds to save and leave, before SIGKILL
_REQUEUES = 100  # in a row without any progress


class Stopped(UserError):
    """The chain stopped; the reason stands in the run directory too."""


class Observer(Protocol):
    """Is told what the driver does; everything comes from the driver's thread."""

    def kept(self, stage: Stage) -> None:
        """A stage was complete before."""
        ...

    def started(self, stage: Stage, attempt: int, workers: int) -> None:
        """A stage's jobs were submitted."""
        ...

    def progress(self, stage: Stage, now: Advance, rate: float) -> None:
        """A running stage, twice a second; ``rate`` in inputs (or steps) a second."""
        ...

    def finished(self, stage: Stage, manifest: Mapping[str, Any]) -> None:
        """A stage's gate has committed its manifest."""
        ...

    def retried(self, stage: Stage, reason: str) -> None:
        """A stage is tried again."""
        ...

    def failed(self, stage: Stage, reason: str) -> None:
        """A stage stops the chain."""
        ...


class Quiet:
    """An observer that says nothing."""

    def kept(self, stage: Stage) -> None:
        """Says nothing."""

    def started(self, stage: Stage, attempt: int, workers: int) -> None:
        """Says nothing."""

    def progress(self, stage: Stage, now: Advance, rate: float) -> None:
        """Says nothing."""

    def finished(self, stage: Stage, manifest: Mapping[str, Any]) -> None:
        """Says nothing."""

    def retried(self, stage: Stage, reason: str) -> None:
        """Says nothing."""

    def failed(self, stage: Stage, reason: str) -> None:
        """Says nothing."""


def drive(
    chain: Chain,
    executor: Executor,
    observer: Observer | None = None,
    slots: int | None = None,
    retries: int = 3,
    remake: bool = False,
    other_image: bool = False,
) -> None:
    """Runs what is missing of a chain, in dependency order, and returns when it is complete.

    Stages whose parents are complete run side by side while slots are free. A job stage
    takes up to `Stage.workers` slots for its one process, as threads.

    Args:
        chain: What to run, and where.
        executor: Runs the jobs; closed at the end.
        observer: Is told what happens.
        slots: How many workers may run at once; by default one a core.
        retries: How often in a row a stage may fail without any progress in between.
        remake: Make stages again that were made with another configuration.
        other_image: Go on in another container image than the run began in.

    Raises:
        Stopped: A stage failed for good, or the chain was cancelled.
        UserError: The run directory cannot be used as it is.
        KeyboardInterrupt: Ctrl-C; all workers have saved and left.
        SystemExit: Likewise on SIGTERM or SIGHUP, with status 128 + the signal's number.
    """
    chain.run.create()
    with chain.run.lock() as lock:
        executor.keep = (lock,)
        try:
            chain.run.unmark(STOPPED, CANCELLED)
            if not remake:
                gates.refuse_changes(chain)
            if not other_image:
                chain.run.refuse_other_image(chain.image or image(), chain.images)
            driver = _Driver(chain, executor, observer or Quiet(), slots or cores(), retries)
            with driver.signals():
                driver.run()
        finally:
            executor.close()


@dataclass
class _Running:
    """A stage at work."""

    stage: Stage
    attempt: int
    handles: list[str] = field(default_factory=list)
    slots: int = 0
    retries: int = 0
    requeues: int = 0
    best: int = -1  # the furthest it has ever been
    seen: set[int] = field(default_factory=set)  # processes that stand in jobs.jsonl
    look: float = 0.0  # when to look at its progress again
    history: deque[tuple[float, int]] = field(default_factory=deque)


class _Driver:
    def __init__(
        self, chain: Chain, executor: Executor, observer: Observer, slots: int, retries: int
    ) -> None:
        self.chain, self.executor, self.observer = chain, executor, observer
        self.slots, self.retries = slots, retries
        self.done: set[str] = set()
        self.running: dict[str, _Running] = {}
        self.signal = 0
        self.signalled = 0

    def run(self) -> None:
        """Until every stage is complete."""
        gates.withdraw(self.chain)
        for name, stage in self.chain.stages.items():
            before = rests_on(self.chain, name)
            if self.done.issuperset(before) and gates.fresh(self.chain, name):
                self.done.add(name)
                self.observer.kept(stage)
        if len(self.done) < len(self.chain.stages):
            self.chain.run.add_provenance(self.chain.packages, self.chain.image, self.chain.images)
        try:
            while len(self.done) < len(self.chain.stages):
                self._check_markers()
                self._start_ready()
                for running in list(self.running.values()):
                    self._step(running)
                time.sleep(_POLL)
        except BaseException:
            self._leave()
            raise

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Turns signals into a flag that the loop looks at; a second one kills the workers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            self.signalled += 1

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _check_markers(self) -> None:
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal:
            raise SystemExit(128 + self.signal)
        reason = self.chain.run.marked(CANCELLED)
        if reason is not None:
            raise Stopped(f"{self.chain.run.path}: cancelled {reason}".rstrip())

    # ---- starting

    def _free(self) -> int:
        return self.slots - sum(running.slots for running in self.running.values())

    def _start_ready(self) -> None:
        for name, stage in self.chain.stages.items():
            if name in self.done or name in self.running or self._free() < 1:
                continue
            if all(parent in self.done for parent in stage.parents):
                gates.prepare(self.chain, name)
                running = _Running(stage, attempt=_next_attempt(self.chain.run.logs(name)))
                if self._nothing_left(stage) and self._gate(running):
                    continue
                self.running[name] = running
                self._submit(running)

    def _nothing_left(self, stage: Stage) -> bool:
        """Whether a killed driver left only the gate to do, or a decision lets the stage pass."""
        if skipped_by(self.chain, stage.name):
            return True
        if stage.kind == "map":
            return not gates.missing(self.chain, stage.name)
        return self.chain.run.counts(stage.name).exists()

    def _submit(self, running: _Running) -> None:
        """Starts an attempt, with as many workers as there is room and work for."""
        running.handles, running.slots = [], 0
        self._add_workers(running)
        self.observer.started(running.stage, running.attempt, running.slots)

    def _add_workers(self, running: _Running) -> None:
        stage = running.stage
        room = min(stage.workers - running.slots, self._free())
        if stage.kind == "map":
            room = min(room, len(gates.missing(self.chain, stage.name)) - running.slots)
        if running.slots == 0:
            room = max(room, 1)
        if room < 1:
            return
        share = max(1, cores() // self.slots)
        job = Job(
            stage=stage.name,
            command=(*self.chain.command, "work", str(self.chain.run.path), stage.name),
            logs=self.chain.run.logs(stage.name),
            attempt=running.attempt,
            count=room if stage.kind == "map" else 1,
            threads=share if stage.kind == "map" else share * room,
            resources=stage.resources,
        )
        running.handles.append(self.executor.submit(job))
        running.slots += room

    # ---- watching

    def _step(self, running: _Running) -> None:
        states = [self.executor.state(handle) for handle in running.handles]
        self._record(running, states)
        ended = [pair for state in states for pair in state.ended]
        for status, log in ended:
            if status == 2:
                self._fail(running, last_line(log) or f"see {log}", log=None)
            if status == gates.STOP:
                self._check_markers()
                self._fail(running, self.chain.run.marked(STOPPED) or last_line(log), log)
        alive = sum(state.running for state in states)
        if time.monotonic() >= running.look:
            now = self._report(running)
            if now.total and now.errors > running.stage.error_limit * now.total:
                self._fail(running, gates.too_many_errors(self.chain, running.stage.name), None)
            if alive and not ended and running.stage.kind == "map" and self._free() > 0:
                self._add_workers(running)
        if alive == 0 and not self._gate(running):
            self._again(running, ended)

    def _report(self, running: _Running) -> Advance:
        begun = time.monotonic()
        now, clock = advance(self.chain, running.stage.name), time.monotonic()
        # Looking at ten thousands of sidecars takes a while; it must not be all that is done.
        running.look = clock + max(_REPORT, 20 * (clock - begun))
        history = running.history
        history.append((clock, now.done))
        while len(history) > 2 and clock - history[0][0] > _WINDOW:
            history.popleft()
        seconds = clock - history[0][0]
        rate = max(0, now.done - history[0][1]) / seconds if seconds > 0 else 0.0
        self.observer.progress(running.stage, now, rate)
        return now

    def _record(self, running: _Running, states: Sequence[State]) -> None:
        for process in itertools.chain.from_iterable(state.processes for state in states):
            if process not in running.seen:
                running.seen.add(process)
                self.chain.run.add_job(
                    stage=running.stage.name,
                    attempt=running.attempt,
                    host=socket.gethostname(),
                    process=process,
                )

    # ---- ending

    def _gate(self, running: _Running) -> bool:
        """Whether the stage is complete now."""
        stage = running.stage
        code = gates.check(self.chain, stage.name)
        if code == gates.STOP:
            self._fail(running, self.chain.run.marked(STOPPED) or "", log=None)
        if code == gates.RETRY:
            return False
        self.running.pop(stage.name, None)
        self.done.add(stage.name)
        self.observer.finished(stage, self.chain.run.read_manifest(stage.name) or {})
        return True

    def _again(self, running: _Running, ended: Sequence[tuple[int, Path]]) -> None:
        """Another attempt for what is missing, unless there were too many."""
        reached = self._report(running).done
        if reached > running.best:
            running.best, running.retries, running.requeues = reached, 0, 0
        name = running.stage.name
        reason = gates.describe_missing(self.chain, name)
        failed = [(status, log) for status, log in ended if status not in (0, gates.REQUEUE)]
        asked = any(status == gates.REQUEUE for status, _ in ended)
        if failed:
            status, log = failed[-1]
            reason = f"{_ending(status)} {last_line(log)}".rstrip() + f"; {reason}"
        if not failed and asked and running.requeues < _REQUEUES:
            running.requeues += 1
        elif running.retries < self.retries:
            running.retries += 1
        else:
            tries = f"after {running.retries + 1} attempts without progress"
            self._fail(running, f"{reason} ({tries})", ended[-1][1] if ended else None)
        self.observer.retried(running.stage, reason)
        running.attempt += 1
        running.history.clear()
        self._submit(running)

    def _fail(self, running: _Running, reason: str, log: Path | None) -> None:
        name = running.stage.name
        reason = reason.removeprefix(f"stage {name}: ")
        message = f"stage {name}: {reason}" + (f"; log: {log}" if log else "")
        self.chain.run.mark(STOPPED, message)
        self.observer.failed(running.stage, reason)
        raise Stopped(message)

    def _leave(self) -> None:
        """Asks all workers to save and leave, and waits until they have."""
        handles = [handle for running in self.running.values() for handle in running.handles]
        for handle in handles:
            self.executor.cancel(handle)
        give_up, before = time.monotonic() + _GRACE, self.signalled
        while any(self.executor.state(handle).running for handle in handles):
            if time.monotonic() > give_up or self.signalled > before:
                for handle in handles:
                    self.executor.cancel(handle, kill=True)
            time.sleep(_POLL)


def _ending(status: int) -> str:
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}:"


def _next_attempt(logs: Path) -> int:
    """Attempts go on counting where an earlier driver stopped."""
    numbers = [path.name[1:].partition("-")[0] for path in logs.glob("a*-*.log")]
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)
