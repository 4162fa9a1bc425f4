"""``insightv benchmark``: a finished run on public benchmarks, asked and scored by lmms-eval."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from hpc.errors import UserError
from insightv.cli.models import alone, config_of
from insightv.cli.runs import PRELOAD, RunArgument, opened


def benchmark(
    directory: RunArgument,
    entries: Annotated[
        list[str] | None, typer.Argument(metavar="[ENTRY...]", help="base, multi_agent, …")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Of lmms-eval: chartqa, mmmu_val, …; may be repeated.")
    ] = None,
    python: Annotated[str, typer.Option(help="The interpreter lmms-eval is installed for.")] = "",
    folder: Annotated[str, typer.Option(help="Holds data sets as OWNER/NAME.")] = "",
    include: Annotated[str, typer.Option(help="A folder of further task files.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="First so many questions of each task.")] = 0,
    network: Annotated[
        bool, typer.Option("--network", help="Data sets may be fetched from the hub.")
    ] = False,
) -> None:
    """Evaluate on public benchmarks, which lmms-eval asks and scores.

    What is left out is as in the run's chain file.
    """
    from hpc.driver import drive
    from hpc.executors.local import LocalExecutor
    from hpc.progress import Bars
    from hpc.rundir import RunDir
    from insightv.evaluation.benchmark_scores import ALONE, SCORES, read_scores
    from insightv.evaluation.benchmarks import QUESTIONS
    from insightv.evaluation.paper import markdown

    run = opened(directory).run
    config = config_of(run)
    given: dict[str, Any] = {
        "tasks": task,
        "entries": entries,
        "python": python,
        "folder": folder,
        "include": include,
        "limit": limit,
        "network": network,
    }
    asked = replace(config.benchmarks, **{name: value for name, value in given.items() if value})
    if not asked.tasks:
        raise UserError("benchmark: name tasks of lmms-eval with --task (chartqa, mmmu_val, …)")
    asked.validate()
    asked.resolve()
    config.benchmarks = asked
    chain = alone(config, run, RunDir(run.path / ALONE), (QUESTIONS,), "lmms-")
    with Bars() as bars:
        executor = LocalExecutor(preload=PRELOAD)
        drive(chain, executor, bars, slots=config.local.slots or None, remake=True)
    found = read_scores(chain.run.path)
    assert found is not None
    told = markdown(found)
    table = chain.run.stage_dir(SCORES) / "tables.md"
    table.write_text(told, encoding="utf-8")
    print(told)
    print(table)


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command("benchmark", rich_help_panel="Single steps")(benchmark)
