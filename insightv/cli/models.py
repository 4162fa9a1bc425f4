"""Commands that look into a run, and single trainings and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from insightv.cli.runs import RunArgument, opened, report


def why(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Of a question, path, pair, …")],
    directory: RunArgument,
) -> None:
    """Tell where a record comes from and what became of it."""
    from rich.console import Console

    from insightv.lineage import why as lineage

    chain = opened(directory)
    Console(highlight=False).print(lineage(chain.run, chain.stages, key))
