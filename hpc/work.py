"""The payload of a stage: what ``PROGRAM work RUN STAGE`` does.

Exit statuses: 0 the stage (or, for a job, the job) is done, or let pass · 1 the payload failed, its
traceback is in the log · 75 the time limit is near, queue me again · 77 the run was
cancelled · 78 other workers have in hand all that is left · 130, 143 asked to leave by SIGINT,
SIGTERM: never to be queued again by itself.
A `UserError` passes through; the program shows its one line and exits with 2. Whatever the
status, finished work is saved and leases are free.
"""

from __future__ import annotations

import difflib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hpc.context import RunContext, Signals
from hpc.decisions import skipped_by
from hpc.disk import told, write_atomic
from hpc.errors import UserError
from hpc.gates import DONE, REQUEUE
from hpc.mapping import Pace, Worker
from hpc.rundir import Chain
from hpc.stages import Stage

_DUMP_SECONDS = 10.0


def work(chain: Chain, stage_name: str, pace: Pace | None = None) -> int:
    """Does a stage's work in this process.

    Args:
        chain: The chain.
        stage_name: One of its stages.
        pace: When a worker of a map stage beats, waits and gives up.

    Returns:
        The exit status, as above.

    Raises:
        UserError: There is no such stage, or its payload says what the user can mend.
    """
    stage = chain.stages.get(stage_name)
    if stage is None:
        near = difflib.get_close_matches(stage_name, chain.stages, 1, 0.0)
        raise UserError(f"no stage {stage_name!r}; did you mean {(near or ['nothing'])[0]}?")
    if skipped := skipped_by(chain, stage_name):
        print(f"skipped by {skipped['by']}: {skipped['reason']}", flush=True)
        return DONE
    with Signals(chain, stage).caught() as signals:
        try:
            context = RunContext(chain, stage, signals)
            if stage.kind == "map":
                return Worker(chain, stage, context, signals, pace or _pace()).run()
            return _run_job(chain, stage, context, signals)
        except UserError:
            raise
        except Exception as error:
            # Whatever a payload was writing where it met a full disk: that is no fault of it.
            if isinstance(error, OSError) and (problem := told(error, _place(error, chain))):
                raise problem from error
            traceback.print_exc(file=sys.stderr)
            return 1


def _place(error: OSError, chain: Chain) -> str:
    """Which file it was about, or at least which run."""
    return str(error.filename or chain.run.path)


def _pace() -> Pace:
    """The usual pace, but for what a cluster profile sets."""
    usual = Pace()
    ttl = float(os.environ.get("HPC_LEASE_TTL", usual.ttl))
    stall = float(os.environ.get("HPC_STALL", usual.stall))
    linger = os.environ.get("HPC_LINGER")
    return Pace(ttl=ttl, stall=stall, linger=usual.linger if linger is None else float(linger))


@contextmanager
def _watched(context: RunContext) -> Iterator[None]:
    """Ends the process, to be queued again, once its job has not moved for too long.

    Only where a cluster profile says how long that is. Every thread's stack is printed; a
    moment is left to the other ranks to do the same.
    """
    limit, ended = float(os.environ.get("HPC_STALL", 0)), threading.Event()

    def watch() -> None:
        while not ended.wait(min(limit / 10, 10.0)):
            idle = time.monotonic() - context.moved
            if idle > limit:
                print(f"no progress for {idle:.0f} s; giving up", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                ended.wait(_DUMP_SECONDS)
                os._exit(REQUEUE)

    if limit:
        threading.Thread(target=watch, name="watch", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _run_job(chain: Chain, stage: Stage, context: RunContext, signals: Signals) -> int:
    """Runs a job once; its counts, written at the end by rank 0, tell the gate it is done."""
    assert stage.run is not None
    if not context.lead:
        with _watched(context):
            counts = stage.run(context)
        return 0 if counts is not None else signals.status() or REQUEUE
    path = chain.run.counts(stage.name)
    path.unlink(missing_ok=True)
    if (asked := signals.status()) is not None:
        return asked
    with _watched(context):
        counts = stage.run(context)
    # A payload that was asked to leave and did returns no counts. Of several ranks it may have
    # been another that was asked: the highest of their statuses is the job's.
    if counts is None and ((asked := signals.status()) is not None or stage.distributed):
        return asked or REQUEUE
    write_atomic(path, json.dumps(counts or {}, indent=1) + "\n")
    return 0
