"""Commands that use what a run has made: its records, its models, its page."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc.errors import RecordError, UserError
from insightv.cli.runs import PRELOAD, RunArgument, console, is_run, opened

if TYPE_CHECKING:
    from hpc.rundir import Chain, RunDir
    from insightv.config import ChainConfig


def report(directory: RunArgument) -> None:
    """Write a run's page from what it has so far."""
    from insightv.report import write_report

    print(write_report(opened(directory).run.path))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run directories.")],
    out: Annotated[Path | None, typer.Option(help="Write the tables here, as Markdown.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Draw the plots (SVG) into this folder.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples behind the intervals.")] = 0,
) -> None:
    """Put finished runs beside each other: seeds pooled, sizes and rounds as curves."""
    from insightv.evaluation.comparison import compare as read
    from insightv.report.comparison import write_comparison

    text = write_comparison(read(runs, seed), out, plots)
    print(out if out is not None else text)


def why(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Of a question, path, pair, …")],
    directory: RunArgument,
) -> None:
    """Tell where a record comes from, and what became of it.

    The directory may also come first, as other commands have it.
    """
    from insightv.lineage import why as lineage

    if not is_run(directory):
        if not is_run(Path(key)):
            raise UserError(
                f"{directory} is no run directory: it has no chain.yaml, nor has {key[:200]}; "
                "give `insightv why KEY DIR`"
            )
        key, directory = str(directory), Path(key)
    chain = opened(directory)
    console().print(lineage(chain.run, chain.stages, key))


def ask(
    directory: RunArgument,
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A PNG, JPEG or WebP file.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="About the picture.")],
) -> None:
    """Ask both agents about a picture.

    Shows the steps as they come, the answer, and the answer without the steps.
    """
    from insightv.pictures import Pictures, PictureWriter, decode
    from insightv.records import Question

    if not question.strip():
        raise UserError("QUESTION is empty; ask something about the picture")
    chain = opened(directory)
    reasoning, summary = agents_of(chain.run)
    try:
        data = picture.read_bytes()
        decode(data, str(picture))
    except OSError as error:
        raise UserError(f"{picture}: {error.strerror}; give a picture file") from None
    except RecordError as error:
        raise UserError(f"{error}; give a PNG, JPEG or WebP file") from None
    with tempfile.TemporaryDirectory() as folder:
        with PictureWriter(Path(folder)) as writer:
            name = writer.add(data)
        asked = Question("asked:here:0", question, (name,), "", "text")
        try:
            asyncio.run(
                _ask(config_of(chain.run), reasoning, summary, asked, Pictures([Path(folder)]))
            )
        except RecordError as error:
            raise UserError(f"{picture}: {error}") from None


async def _ask(
    config: ChainConfig, reasoning: Path, summary: Path, question: Any, pictures: Any
) -> None:
    from insightv.engines import load_engine
    from insightv.evaluation.answering import EntryConfig
    from insightv.evaluation.asking import ask_and_print
    from insightv.prompting import load_prompts

    asked = config.evaluation
    entry = EntryConfig(
        "ask", "multi_agent", str(reasoning), str(summary), asked.reasoning, asked.answer
    )
    first, last = (
        load_engine(folder, config.engine, pictures, share=0.5) for folder in (reasoning, summary)
    )
    try:
        prompts = load_prompts(config.models.base.prompts)
        await ask_and_print(first, last, prompts, question, entry, seed=config.seed)
    finally:
        await first.close()
        await last.close()


def agents_of(run: RunDir) -> tuple[Path, Path]:
    """The reasoning agent that the rounds ended in, or of the last so far; the summary agent.

    Raises:
        UserError: The run has not trained them yet.
    """
    # A model that is being written, or was when its training ended, is reasoning-r1.part.
    numbers = [path.name[11:] for path in run.models.glob("reasoning-r*")]
    rounds = [f"r{number}" for number in sorted(map(int, filter(str.isdecimal, numbers)))]
    names = ["reasoning", *(f"reasoning-{name}" for name in (*rounds, "chosen"))]
    found = [run.models / name for name in names if (run.models / name).is_dir()]
    summary = run.models / "summary"
    if not found or not summary.is_dir():
        raise UserError(f"{run.path}: the agents are not trained yet; see `insightv status`")
    return found[-1], summary


def config_of(run: RunDir) -> ChainConfig:
    """The resolved configuration of a run."""
    from hpc.config import load
    from insightv.config import ChainConfig

    return load(ChainConfig, run.chain_file)


def evaluate(
    directory: RunArgument,
    entries: Annotated[list[str], typer.Argument(metavar="ENTRY...", help="base, multi_agent, …")],
    split: Annotated[str, typer.Option(help="validation or test.")] = "validation",
) -> None:
    """Evaluate entries of the ladder with a run's models."""
    from hpc.driver import drive
    from hpc.executors.local import LocalExecutor
    from hpc.progress import Bars
    from hpc.rundir import RunDir
    from insightv.evaluation.results import collect, results_table

    run = opened(directory).run
    config = config_of(run)
    config.evaluation = replace(config.evaluation, entries=entries, split=split)
    config.evaluation.validate()
    place = RunDir(run.path / "evaluations" / split)
    chain = alone(config, run, place, (f"questions-{split}",), "eval-")
    with Bars() as bars:
        executor = LocalExecutor(preload=PRELOAD)
        drive(chain, executor, bars, slots=config.local.slots or None, remake=True)
    console().print(results_table(collect(chain.run.path, config.evaluation.resamples_seed)))


def alone(
    config: ChainConfig, run: RunDir, place: RunDir, names: Sequence[str], prefix: str
) -> Chain:
    """Some stages alone, in a run directory of their own within the run.

    They use the run's models as they are now; a retrained model makes their predictions again.

    Args:
        config: The run's, with what is to be evaluated.
        run: The run.
        place: The directory within it.
        names: Of the stages.
        prefix: Further stages' names begin so.

    Raises:
        UserError: The run lacks a model that is needed.
    """
    from hpc.config import dump
    from hpc.disk import make_folder, write_atomic
    from hpc.rundir import Chain
    from insightv.chain import assemble

    whole = assemble(config, place)
    wanted = [name for name in whole.stages if name in names or name.startswith(prefix)]
    stages = []
    for name in wanted:
        stage = whole.stages[name]
        elsewhere = [maker for maker in stage.after if maker not in wanted]
        made = {maker: (run.read_manifest(maker) or {}).get("made") for maker in elsewhere}
        if None in made.values():
            maker = next(maker for maker in made if made[maker] is None)
            raise UserError(f"{run.path}: {name} needs stage {maker}, which is not complete")
        more = {} if name in names else {"made": made}
        after = tuple(maker for maker in stage.after if maker in wanted)
        stages.append(replace(stage, after=after, config={**stage.config, **more}))
    make_folder(place.path)
    link = place.path / "models"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(run.models, place.path))
    write_atomic(place.chain_file, dump(config))
    return Chain(stages, place, whole.command, whole.packages)


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    for name, command in (("ask", ask), ("why", why), ("report", report), ("compare", compare)):
        app.command(name, rich_help_panel="Look")(command)
    app.command("evaluate", rich_help_panel="Single steps")(evaluate)
