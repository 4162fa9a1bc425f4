"""The pulling worker of a map stage.

It claims a shard, keeps the mapper's calls in flight, and claims the next shard as soon
as calls run free, so that the engine behind the mapper stays full across shard ends.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpc.context import RunContext, Signals
from hpc.errors import RecordError, UserError
from hpc.gates import DONE, SPARE
from hpc.leases import Lease, Leases, LostLease, Owner, gone
from hpc.reading import join_shard
from hpc.rundir import Chain
from hpc.shards import Limits, ShardWriter, adopt
from hpc.sidecars import (
    list_folder,
    part_path,
    read_sidecar,
    remove_parts,
    shard_path,
    sidecar_path,
)
from hpc.stages import Mapper, Row, Stage

_TICK = 0.5
# An idle worker looks for work about every tenth of the time it has waited.
_PATIENCE = 0.1
_SHORTEST_POLL = 0.05
# Free shards remembered from a listing. As many more listings as this are saved, and as many
# names asked for in vain at worst.
_LOTS = 32


@dataclass(frozen=True)
class Pace:
    """When a worker beats, waits and gives up. Nothing here shapes results.

    Attributes:
        ttl: Seconds after which a lease whose counter stands still is taken over.
        stall: Seconds without a finished call after which the worker is taken for hung: it
            stops beating, so that it is robbed. After twice that time it ends itself. Must
            exceed the longest call and the loading of the engine.
        linger: Seconds without work after which a worker leaves if living owners hold all that
            is left; None: it stays until the stage is complete, to take over from any that dies.
        close: Seconds the mapper may take to close, and its calls to be cancelled.
        limits: When a frame of the output is closed.
        dead: Whether the owner of a lease is known to be gone.
    """

    ttl: float = 60.0
    stall: float = 1800.0
    linger: float | None = None
    close: float = 10.0
    limits: Limits = field(default_factory=Limits)
    dead: Callable[[Owner], bool] = gone


@dataclass
class _Claim:
    """A shard this worker holds."""

    index: int
    lease: Lease
    writer: ShardWriter
    inputs: Iterator[tuple[str, dict[str, list[Row]]]]
    order: list[str] = field(default_factory=list)
    flying: int = 0
    exhausted: bool = False
    lost: bool = False

    def next(self) -> tuple[str, dict[str, list[Row]]] | None:
        """The next input that is not done yet."""
        for key, rows in self.inputs:
            self.order.append(key)
            if key not in self.writer.done:
                self.flying += 1
                return key, rows
        self.exhausted = True
        return None


class Worker:
    """One process' share of a map stage."""

    def __init__(
        self, chain: Chain, stage: Stage, context: RunContext, signals: Signals, pace: Pace
    ) -> None:
        """Prepares to work; nothing is claimed yet."""
        self._stage, self._context, self._signals, self._pace = stage, context, signals, pace
        self._out = chain.run.shards(stage.name)
        self._leases = Leases(chain.run.leases(stage.name), context.owner, pace.ttl, dead=pace.dead)
        self._folders = {role: chain.run.shards(name) for role, name in stage.inputs.items()}
        self._source = next(iter(self._folders.values()))
        self._count = _count(self._source)
        self._left: dict[int, int] = {}
        self._whole = False
        self._claims: dict[int, _Claim] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._moved = time.monotonic()
        self._idle_since: float | None = None
        self._next_look = 0.0
        self._complete = False

    def run(self) -> int:
        """Works until the stage is complete or the worker is asked to leave.

        Returns:
            0 when the stage is complete, 78 when the rest is in other hands, else the status of
            who asked.

        Raises:
            UserError: Something the user can mend; finished work is saved, leases are free.
            Exception: The payload's failure; likewise.
        """
        beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        beating.start()
        try:
            status = self._first_claim()
            if status is not None:
                return status
            loop = asyncio.new_event_loop()
            try:
                return loop.run_until_complete(self._work())
            finally:
                loop.close()
        finally:
            self._put_down()
            self._ended.set()
            self._context.hush()
            if self._complete:
                self._sweep()

    # ---- claiming

    def _first_claim(self) -> int | None:
        """Waits for work before anything is loaded; a status if there will be none."""
        while True:
            if (asked := self._signals.status()) is not None:
                return asked
            if self._look() is not None:
                return None
            if self._complete or self._spare():
                return DONE if self._complete else SPARE
            time.sleep(self._nap())

    def _look(self) -> _Claim | None:
        """Claims, but not at each call: a look costs metadata operations."""
        now = time.monotonic()
        if now < self._next_look:
            return None
        if (claim := self._claim()) is not None:
            self._look_at_once()
            return claim
        self._idle_since = self._idle_since or now
        poll = max(_PATIENCE * (now - self._idle_since), _SHORTEST_POLL)
        self._next_look = now + min(poll, self._pace.ttl / 12)
        return None

    def _look_at_once(self) -> None:
        self._idle_since, self._next_look = None, 0.0

    def _nap(self) -> float:
        """Seconds to the next look, short enough for signals to be heard."""
        return min(max(self._next_look - time.monotonic(), 0.0), _TICK)

    def _spare(self) -> bool:
        """Whether nobody needs this worker any more: living owners hold all that is left."""
        if self._pace.linger is None or self._idle_since is None or not self._whole:
            return False
        idle = time.monotonic() - self._idle_since
        return idle >= self._pace.linger and self._leases.living(self._left)

    def _claim(self) -> _Claim | None:
        """Takes a shard that nobody holds, if there is one."""
        while (lease := self._lease()) is not None:
            self._left.pop(lease.index, None)
            try:
                claim = self._open(lease)
            except (LostLease, FileNotFoundError):
                lease.close()
                self._forget()
                continue
            except BaseException:
                lease.release()
                raise
            if claim is not None:
                with self._lock:
                    self._claims[lease.index] = claim
                self._moved = time.monotonic()
                return claim
            lease.drop()
        return None

    def _lease(self) -> Lease | None:
        """A lease on an unfinished shard.

        Listing thousands of shards costs too much to be done for each. So a worker draws some
        lots at a listing, and asks by name which of them were finished meanwhile. Once hardly
        any shard is free it remembers all that are left, and lists them no more.
        """
        if not self._left and not self._whole:
            self._draw()
        lease = self._claim_lot()
        if lease is None and not self._whole:
            self._draw()
            lease = self._claim_lot()
        done = lease is None and self._whole and not self._left
        self._complete = done and not self._claims
        return lease

    def _claim_lot(self) -> Lease | None:
        # Owners are only looked after when no free shard is left anywhere.
        return self._leases.claim(dict(self._left), self._finished, takeover=self._whole)

    def _draw(self) -> None:
        """Lists the folders and remembers some free shards, or all that is left."""
        folder, held = list_folder(self._out), self._leases.held()
        left = set(range(self._count)) - folder.complete - self._claims.keys()
        free = sorted(left - held.keys())
        self._whole = len(free) <= _LOTS
        drawn = left if self._whole else random.sample(free, _LOTS)
        self._left = {index: folder.floor(index) for index in drawn}

    def _finished(self, index: int) -> bool:
        """Whether a shard was finished since the last listing."""
        finished = sidecar_path(shard_path(self._out, index)).exists()
        # A lot is tried once: if it is neither finished nor free, another is at work on it.
        if finished or not self._whole:
            del self._left[index]
        return finished

    def _forget(self) -> None:
        """Lists anew at the next look: what was remembered has turned out wrong."""
        self._left, self._whole = {}, False

    def _open(self, lease: Lease) -> _Claim | None:
        """Begins a shard, or goes on with a predecessor's; None if it turns out complete."""
        index = lease.index
        if sidecar_path(shard_path(self._out, index)).exists():
            return None
        if shard_path(self._out, index).exists():
            source = read_sidecar(shard_path(self._source, index))
            counted = self._stage.counted
            if adopt(self._out, index, source, lease.generation, counted) is not None:
                return None
        parts = (part_path(self._out, index, older) for older in range(lease.generation)[::-1])
        resume = next((part for part in parts if part.exists()), None)
        writer = ShardWriter(
            self._out, index, lease.generation, resume, self._pace.limits, self._stage.counted
        )
        inputs = join_shard(self._folders, index, skip=frozenset(writer.done))
        return _Claim(index, lease, writer, inputs)

    # ---- working

    async def _work(self) -> int:
        assert self._stage.load is not None
        mapper: Mapper = self._stage.load(self._context)
        self._context.ready()
        self._moved = time.monotonic()
        calls: dict[asyncio.Task[list[Row]], tuple[_Claim, str]] = {}
        try:
            while (status := self._signals.status()) is None:
                self._drop_lost(calls)
                self._fill(mapper, calls)
                self._tell()
                if calls:
                    await self._collect(calls)
                elif self._complete or self._spare():
                    return DONE if self._complete else SPARE
                else:
                    self._moved = time.monotonic()
                    await asyncio.sleep(self._nap())
            return status
        finally:
            # What is done is saved before anything that may hang.
            self._put_down()
            await self._close(mapper, calls)

    def _fill(
        self, mapper: Mapper, calls: dict[asyncio.Task[list[Row]], tuple[_Claim, str]]
    ) -> None:
        """Starts calls until the mapper has as many as it wants."""
        while len(calls) < mapper.concurrency and (found := self._next_input()) is not None:
            claim, key, rows = found
            calls[asyncio.ensure_future(mapper(key, rows))] = (claim, key)

    def _next_input(self) -> tuple[_Claim, str, dict[str, list[Row]]] | None:
        while True:
            for claim in list(self._claims.values()):
                if not claim.exhausted and (found := claim.next()) is not None:
                    return claim, *found
                self._commit_if_done(claim)
            if self._look() is None:
                return None

    async def _collect(self, calls: dict[asyncio.Task[list[Row]], tuple[_Claim, str]]) -> None:
        """Waits for calls to end and stores what they returned."""
        ended, _ = await asyncio.wait(calls, timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
        failure: BaseException | None = None
        for task in ended:
            claim, key = calls.pop(task)
            claim.flying -= 1
            self._moved = time.monotonic()
            if not claim.lost:
                failure = self._store(claim, key, task) or failure
        if failure is not None:  # The others' outcomes are stored by now.
            raise failure
        for claim in self._claims.values():
            claim.writer.flush_if_old()

    def _store(
        self, claim: _Claim, key: str, task: asyncio.Task[list[Row]]
    ) -> BaseException | None:
        """Stores an outcome; returns what must end the worker."""
        try:
            rows, error = task.result(), ""
        except RecordError as failed:
            rows, error = [], str(failed) or "failed without giving a reason"
        except asyncio.CancelledError:
            return RuntimeError(f"stage {self._stage.name}: the call for {key!r} was cancelled")
        except Exception as failure:
            failure.add_note(f"in stage {self._stage.name}, input {key!r}")
            return failure
        claim.writer.add(key, rows, error)
        self._commit_if_done(claim)
        return None

    def _commit_if_done(self, claim: _Claim) -> None:
        if claim.lost or claim.flying or not claim.exhausted:
            return
        if surplus := claim.writer.done.difference(claim.order):
            raise UserError(
                f"{claim.writer.path}: unfinished work holds key {min(surplus)!r}, which its "
                f"input lacks; delete {self._out.parent} and run again"
            )
        try:
            claim.writer.commit(claim.order)
        except LostLease:
            self._let_go(claim)
            return
        with self._lock:
            del self._claims[claim.index]
            claim.lease.drop()
        self._look_at_once()

    # ---- losing and leaving

    def _drop_lost(self, calls: dict[asyncio.Task[list[Row]], tuple[_Claim, str]]) -> None:
        for claim in [claim for claim in self._claims.values() if claim.lost]:
            for task, (owner, _) in list(calls.items()):
                if owner is claim:
                    task.cancel()
                    del calls[task]
            self._let_go(claim)

    def _let_go(self, claim: _Claim) -> None:
        """Forgets a shard that another worker has taken over or finished."""
        claim.lost = True
        claim.writer.abandon()
        self._forget()
        with self._lock:
            self._claims.pop(claim.index, None)
            if sidecar_path(claim.writer.path).exists():
                claim.lease.drop()
            else:
                claim.lease.close()

    def _put_down(self) -> None:
        """Saves what is done and frees all leases."""
        for claim in list(self._claims.values()):
            if not claim.lost:
                # The failure under way is the one to be heard of.
                with suppress(UserError, OSError):
                    claim.writer.flush()
            claim.writer.abandon()
            with self._lock:
                del self._claims[claim.index]
                claim.lease.close() if claim.lost else claim.lease.release()

    def _sweep(self) -> None:
        """Removes what owners left that were killed, or lost, after their shard was complete."""
        self._leases.clear()
        for index, generation in list_folder(self._out).generations.items():
            remove_parts(self._out, index, generation)

    async def _close(
        self, mapper: Mapper, calls: dict[asyncio.Task[list[Row]], tuple[_Claim, str]]
    ) -> None:
        for task in calls:
            task.cancel()
        if calls:
            ended, _ = await asyncio.wait(calls, timeout=self._pace.close)
            for task in ended:
                task.cancelled() or task.exception()  # Seen: nothing to complain about at exit.
        try:
            await asyncio.wait_for(mapper.close(), self._pace.close)
        except Exception:  # all work is saved; what would not close is told in the worker's log
            traceback.print_exc()

    # ---- telling

    def _tell(self) -> None:
        self._context.tell(sum(len(claim.writer.done) for claim in self._claims.values()), 0)

    def _beat(self) -> None:
        """The heartbeat's thread. It beats as long as the main loop gets somewhere."""
        interval = self._pace.ttl / 6
        woken = time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            if now - woken > 2 * interval + 1:
                self._moved += now - woken  # The whole process was stopped for a while.
            woken = now
            idle = now - self._moved
            if self._claims and idle > 2 * self._pace.stall:
                print(f"no call has ended for {idle:.0f} s; giving up", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(1)
            if idle <= self._pace.stall:
                self._beat_once()

    def _beat_once(self) -> None:
        for claim in list(self._claims.values()):
            with self._lock:
                if self._claims.get(claim.index) is not claim:
                    continue
                try:
                    claim.lease.beat()
                except LostLease:
                    claim.lost = True
                except (UserError, OSError):
                    pass  # A disk that is full now may have room at the next beat.


def _count(folder: Path) -> int:
    """How many shards the input that is walked has, which must be numbered without gaps."""
    complete = list_folder(folder).complete
    if not folder.is_dir():
        raise UserError(f"{folder}: there are no shards; run the stage that makes them first")
    if gaps := set(range(max(complete, default=-1) + 1)) - complete:
        path = shard_path(folder, min(gaps))
        raise UserError(f"{path}: the input is not complete; run its stage again")
    return len(complete)
