"""Commands that run a chain on a Slurm cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from insightv.cli.runs import (
    ChainArgument,
    OtherImageOption,
    Overrides,
    RemakeOption,
    RunOption,
    save,
)

if TYPE_CHECKING:
    from hpc.cluster import Profile
    from hpc.rundir import Chain

ProfileOption = Annotated[
    Path, typer.Option("--cluster", metavar="PROFILE", help="A cluster profile (YAML).")
]


def submit(
    chain: ChainArgument,
    overrides: Overrides = None,
    cluster: ProfileOption = ...,  # type: ignore[assignment]
    run_dir: RunOption = None,
    remake: RemakeOption = False,
    other_image: OtherImageOption = False,
) -> None:
    """Queue a whole chain on a cluster; the same command adds what is missing."""
    from hpc.cluster import read_profile
    from hpc.rundir import RunDir
    from insightv.chain import assemble
    from insightv.chainfile import read

    profile = read_profile(cluster)
    config = read(chain, overrides or ())
    assembled = assemble(config, RunDir(run_dir or Path("runs") / chain.stem))
    prepare = partial(save, assembled, config, remake, held=True)
    send(assembled, profile, remake, prepare, other_image)


def send(
    chain: Chain,
    profile: Profile,
    remake: bool = False,
    prepare: Callable[[], None] | None = None,
    other_image: bool = False,
) -> None:
    """Submits what a run lacks, and says so."""
    from hpc.submission import submit

    count = submit(chain, profile, remake=remake, prepare=prepare, other_image=other_image)
    path = chain.run.path
    if count:
        print(f"{path}: {count} jobs submitted; `insightv status {path}` shows them")
    else:
        print(f"{path}: complete or queued as a whole, nothing to submit")


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    from insightv.cli.planning import plan
    from insightv.cli.prefetch import prefetch
    from insightv.cli.rehearsal import rehearse

    app.command("plan", rich_help_panel="Run")(plan)
    app.command("rehearse", rich_help_panel="Run")(rehearse)
    app.command("prefetch", rich_help_panel="Run")(prefetch)
    app.command("submit", rich_help_panel="Run")(submit)
