"""Commands that look after a run: what stands where, what was said, stopping, clearing up."""

from __future__ import annotations

import getpass
import json
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc.errors import UserError, printable
from insightv.cli.runs import RunArgument, console, opened, refuse_queued

if TYPE_CHECKING:
    from hpc.rundir import Chain

_WATCH = 2.0  # seconds between looks


def status(
    directory: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a look.")] = False,
) -> None:
    """Show what stands where."""
    from rich.live import Live

    from hpc.status import board, check_sizes
    from insightv.cli.rehearsal import comparison

    chain = opened(directory)
    check_sizes(chain)
    if as_json or not watch:
        while True:
            found = _look(chain)
            if as_json:
                print(json.dumps(found, ensure_ascii=False), flush=True)
            else:
                console().print(board(found))
                if "forecast" in found:
                    console().print(comparison(found["forecast"]))
            if not watch or found["state"] != "running":
                return
            time.sleep(_WATCH)
    with Live(auto_refresh=False) as live:
        while True:
            found = _look(chain)
            live.update(board(found), refresh=True)
            if found["state"] != "running":
                return
            time.sleep(_WATCH)


def _look(chain: Chain) -> dict[str, Any]:
    """What stands where, on the run's cluster too: one squeue and one sacct."""
    from hpc.forecasting import compare, kept
    from hpc.slurm import available
    from hpc.status import status as look
    from hpc.submission import hours, job_counts, on_cluster

    forecast = kept(chain.run)
    more = {"forecast": compare(chain, forecast)} if forecast is not None else {}
    if not on_cluster(chain.run) or not available():
        return look(chain) | more
    return look(chain, job_counts(chain.run), hours(chain.run)) | more


def cancel(directory: RunArgument) -> None:
    """Stop a run; its workers save and leave."""
    from hpc.rundir import CANCELLED
    from hpc.submission import cancel as cancel_jobs
    from hpc.submission import on_cluster

    run = opened(directory).run
    if on_cluster(run):
        count = cancel_jobs(run)
        print(f"{run.path}: {count} jobs cancelled; `insightv retry {directory}` goes on with it")
        return
    if not run.locked():
        raise UserError(f"{run.path}: nothing runs here")
    run.mark(CANCELLED, f"by {getpass.getuser()} on {socket.gethostname()}")
    print(f"{run.path}: cancelled; `insightv retry {directory}` goes on with it")


def logs(
    directory: RunArgument,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Show its logs.")] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Show those of stages that did not complete.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="So many from the end.")] = 40,
) -> None:
    """Show what the workers said.

    Without STAGE: the last line of each log.
    """
    chain = opened(directory)
    if stage is not None and stage not in chain.stages:
        known = ", ".join(chain.stages)
        raise UserError(f"{chain.run.path}: no stage {stage!r}; it has {known}")
    names = [stage] if stage is not None else list(chain.stages)
    if failed:
        names = [
            name
            for name in names
            if chain.run.started(name).exists() and not chain.run.manifest(name).exists()
        ]
    whole = stage is not None or failed
    found = silent = 0
    for name in names:
        for log in [*_last_attempt(chain.run.logs(name)), *_gate_logs(chain, name, whole)]:
            said = log.read_text(errors="replace").splitlines()
            found, silent = found + 1, silent + (not said)
            if whole:
                told = map(printable, said[-lines:]) if said else ["(empty: it said nothing)"]
                print(f"==> {log} <==", *told, sep="\n")
            elif said:
                print(f"{name}: {printable(said[-1])[:120]}")
    about = f"{chain.run.path}: " + (f"stage {stage}: " if stage is not None else "")
    if failed and not names:
        print(f"{about}no stage has begun and not completed")
    elif not found:
        print(f"{about}no log yet; workers write theirs when they begin")
    elif silent == found and not whole:
        print(f"{about}nobody said anything: every log is empty ({found} of them)")


def _gate_logs(chain: Chain, stage: str, wanted: bool) -> list[Path]:
    """On a cluster: what a stage's last gate said."""
    from hpc.naming import gate_name

    folder = chain.run.path / "slurm" / "logs"
    pattern = gate_name(chain.run, stage, 0).removesuffix("0") + "*.log"
    found = list(folder.glob(pattern)) if wanted else []
    return sorted(found, key=lambda log: log.stat().st_mtime)[-1:]


def _last_attempt(folder: Path) -> list[Path]:
    """The logs of a stage's last attempt; they are named ``a<attempt>-<n>.log``."""
    found: dict[int, list[Path]] = {}
    for log in sorted(folder.glob("a*-*.log")):
        attempt = log.name[1:].partition("-")[0]
        if attempt.isdigit():
            found.setdefault(int(attempt), []).append(log)
    return found[max(found)] if found else []


def clean(
    directory: RunArgument,
    plan: Annotated[bool, typer.Option("--plan", help="Only list; delete nothing.")] = False,
    with_logs: Annotated[
        bool, typer.Option("--logs", help="Logs of complete stages as well.")
    ] = False,
    data: Annotated[
        bool,
        typer.Option("--data", help="Shards nobody needs any more; the run is closed then."),
    ] = False,
) -> None:
    """Delete what complete stages no longer need."""
    from hpc.retention import clean as sweep

    chain = opened(directory)
    if not plan:
        refuse_queued(chain)
    found = sweep(chain, plan=plan, logs=with_logs, data=data)
    for item in found:
        print(f"{item.bytes / 2**20:10.2f} MiB  {item.what:12} {item.path}")
    total = sum(item.bytes for item in found) / 2**20
    print(f"{total:10.2f} MiB  {'to be deleted' if plan else 'deleted'}")


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    for command in (status, logs, cancel, clean):
        app.command(rich_help_panel="Run")(command)
