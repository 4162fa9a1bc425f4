"""Commands that look into a run, and single trainings and evaluations."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc.errors import UserError
from insightv.cli.runs import RunArgument, opened

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_REQUEUE = 75


def report(directory: RunArgument) -> None:
    """Write the page of a run from what it has so far."""
    from insightv.report import write_report

    print(write_report(opened(directory).run.path))


def why(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Of a question, path, pair, …")],
    directory: RunArgument,
) -> None:
    """Tell where a record comes from and what became of it."""
    from rich.console import Console

    from insightv.lineage import why as lineage

    chain = opened(directory)
    Console(highlight=False).print(lineage(chain.run, chain.stages, key))
