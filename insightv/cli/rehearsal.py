"""The command that runs a chain in small and forecasts the whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc.errors import UserError
from insightv.cli.runs import (
    ChainArgument,
    Overrides,
    RunOption,
    console,
    make,
    save,
)

if TYPE_CHECKING:
    from rich.table import Table

    from hpc.cluster import Profile
    from hpc.forecasting import Forecast, Range
    from hpc.rundir import Chain
    from insightv.config import ChainConfig

_LOOK = 5.0  # seconds between looks at the queue
# Pairs need questions that are answered both right and wrong, and batches should not be empty.
_FLOOR = 48


def rehearse(
    chain: ChainArgument,
    overrides: Overrides = None,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", metavar="PROFILE", help="A cluster profile; else here."),
    ] = None,
    run_dir: RunOption = None,
    share: Annotated[float, typer.Option(help="Of the questions.")] = 0.01,
    floor: Annotated[int, typer.Option(help="At least so many of each set and split.")] = _FLOOR,
) -> None:
    """Run the true chain on 1 % of the questions, then forecast the whole; resumes."""
    from hpc.cluster import Profile, read_profile
    from hpc.forecasting import keep
    from hpc.rundir import RunDir
    from insightv.chain import assemble
    from insightv.chainfile import read
    from insightv.rehearsal import from_rehearsal, rehearsal_of, small

    profile = read_profile(cluster) if cluster is not None else None
    config = read(chain, overrides or ())
    whole = assemble(config, RunDir(run_dir or Path("runs") / chain.stem))
    less = small(config, share, floor)
    rehearsed = assemble(less, rehearsal_of(whole.run))
    try:
        if profile is None:
            _here(rehearsed, less)
        else:
            _there(rehearsed, less, profile)
    except UserError as error:
        hint = "" if floor > _FLOOR else "; a larger --floor gives every stage more to do"
        said = f"the rehearsal stopped: {error}{hint if 'empty' in str(error) else ''}"
        raise UserError(said) from None
    found = from_rehearsal(config, whole, profile or Profile())
    if found is None:
        raise UserError(f"{rehearsed.run.path}: not complete; the same command goes on")
    keep(whole.run, found)
    console().print(table(found))
    print(f"{whole.run.path}: forecast.json; `insightv status` sets what comes against it")


def _here(chain: Chain, config: ChainConfig) -> None:
    make(chain, config, remake=True)


def _there(chain: Chain, config: ChainConfig, profile: Profile) -> None:
    """Submits the small chain and waits for its end.

    Raises:
        UserError: It stopped, or was cancelled.
    """
    from hpc.status import status
    from hpc.submission import job_counts, submit

    submit(chain, profile, remake=True, prepare=lambda: save(chain, config, True, held=True))
    print(f"{chain.run.path}: waiting; Ctrl-C leaves it running, the same command comes back to it")
    seen = 0
    while True:
        found = status(chain, job_counts(chain.run))
        done = sum(entry["state"] == "complete" for entry in found["stages"])
        if done > seen:
            print(f"{done} of {len(found['stages'])} stages", flush=True)
            seen = done
        if found["state"] == "complete":
            return
        if found["state"] != "running":
            raise UserError(f"{chain.run.path}: {found['state']} ({found['reason'] or 'no job'})")
        time.sleep(_LOOK)


# ---- showing


def table(forecast: Forecast) -> Table:
    """A forecast, for a terminal; ranges are about 95 %."""
    from rich.table import Table

    from hpc.status import duration

    timed = forecast.wall is not None
    made = Table(title=f"expected, from {forecast.source}", title_justify="left")
    made.add_column("stage")
    for heading in ("processes", "GPUs", "shards", "records", "files", "bytes"):
        made.add_column(heading, justify="right")
    for heading in ("GPU-hours", "time") if timed else ():
        made.add_column(heading, justify="right")
    for item in forecast.stages:
        times = [_hours(item.gpu_hours), _span(item.wall, duration)] if timed else []
        made.add_row(
            item.stage,
            str(item.processes),
            str(item.gpus or ""),
            f"{item.shards:,}" if item.shards else "",
            f"{item.rows:,}" if item.rows else "",
            f"{item.files:,}",
            _size(item.bytes),
            *times,
        )
    made.add_section()
    whole = [_hours(forecast.gpu_hours), _span(forecast.wall, duration)] if timed else []
    shards = sum(item.shards for item in forecast.stages)
    rows = sum(item.rows for item in forecast.stages)
    count = sum(item.files for item in forecast.stages)
    made.add_row(
        "all", "", "", f"{shards:,}", f"{rows:,}", f"{count:,}", _size(forecast.bytes), *whole
    )
    return made


def comparison(found: dict[str, dict[str, Any]]) -> Table:
    """What was forecast beside what came, of the stages that are complete."""
    from rich.table import Table
    from rich.text import Text

    from hpc.status import duration

    made = Table(title="forecast, and what came", title_justify="left")
    made.add_column("stage")
    for heading in ("time", "came", "GPU-hours", "came", "shards' bytes", "came"):
        made.add_column(heading, justify="right")
    shown = {"wall": duration, "gpu_hours": lambda x: f"{x:.3g}", "data": _bytes}
    for stage, pairs in found.items():
        cells: list[Any] = []
        for what, show in shown.items():
            pair = pairs.get(what)
            if pair is None or pair["came"] is None:
                cells += ["", ""]
                continue
            within = pair["low"] <= pair["came"] <= pair["high"]
            came = Text(show(pair["came"]), style="" if within else "yellow")
            cells += [f"{show(pair['low'])}–{show(pair['high'])}", came]
        if any(str(cell) for cell in cells):
            made.add_row(stage, *cells)
    return made


def _size(value: Range) -> str:
    low, mid, high = (_bytes(x) for x in (value.low, value.mid, value.high))
    return mid if low == high else f"{mid} ({low}–{high})"


def _hours(value: Range | None) -> str:
    if value is None or not value.high:
        return ""
    return f"{value.mid:.3g} ({value.low:.2g}–{value.high:.2g})"


def _span(value: Range | None, show: Any) -> str:
    return "" if value is None else f"{show(value.mid)} ({show(value.low)}–{show(value.high)})"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
