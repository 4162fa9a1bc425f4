"""Commands that run a chain on a Slurm cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc.errors import UserError

if TYPE_CHECKING:
    from hpc.cluster import Profile
    from hpc.rundir import Chain

ChainArgument = Annotated[Path, typer.Argument(metavar="CHAIN", help="A chain file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override single keys.")
]
ProfileOption = Annotated[
    Path, typer.Option("--cluster", metavar="PROFILE", help="A cluster profile (YAML).")
]
RunOption = Annotated[
    Path | None, typer.Option(help="Where to; by default runs/NAME of the chain file.")
]


def submit(
    chain: ChainArgument,
    overrides: Overrides = None,
    cluster: ProfileOption = ...,  # type: ignore[assignment]
    run_dir: RunOption = None,
    remake: Annotated[
        bool, typer.Option("--remake", help="Make again what another configuration made.")
    ] = False,
) -> None:
    """Queue a whole chain on a cluster; the same command adds what is missing."""
    from hpc.cluster import read_profile
    from hpc.rundir import RunDir
    from insightv.chain import assemble
    from insightv.cli.runs import save
    from insightv.config import read

    profile = read_profile(cluster)
    config = read(chain, overrides or ())
    assembled = assemble(config, RunDir(run_dir or Path("runs") / chain.stem))
    send(assembled, profile, remake, save=lambda: save(assembled, config, remake, held=True))


def send(chain: Chain, profile: Profile, remake: bool = False, save: Any = None) -> None:
    """Submits what a run lacks, and says so."""
    from hpc.submission import submit

    count = submit(chain, profile, remake=remake, prepare=save)
    path = chain.run.path
    if count:
        print(f"{path}: {count} jobs submitted; `insightv status {path}` shows them")
    else:
        print(f"{path}: complete or queued as a whole, nothing to submit")


def plan(
    chain: ChainArgument,
    overrides: Overrides = None,
    cluster: ProfileOption = ...,  # type: ignore[assignment]
    run_dir: RunOption = None,
    write: Annotated[
        Path | None, typer.Option(metavar="D", help="Write the scripts to this folder.")
    ] = None,
) -> None:
    """Show every job, what it waits for and its exact sbatch text; submit nothing."""
    from hpc.cluster import read_profile
    from hpc.naming import make_id
    from hpc.planning import Planned, chain_script, plan_of
    from hpc.rundir import RunDir
    from hpc.submission import keep_profile
    from insightv.chain import assemble
    from insightv.cli.runs import save
    from insightv.config import read

    profile = read_profile(cluster)
    config = read(chain, overrides or ())
    assembled = assemble(config, RunDir(run_dir or Path("runs") / chain.stem))
    if write is not None:
        # What is submitted by hand reads the same files as what `submit` queues.
        assembled.run.create()
        make_id(assembled.run)
        save(assembled, config, remake=False)
        keep_profile(assembled.run, profile)
    planned: list[Planned] = plan_of(assembled, profile)
    if not planned:
        print(f"{assembled.run.path}: complete, nothing to do")
        return
    _show(planned, profile)
    if write is not None:
        write.mkdir(parents=True, exist_ok=True)
        for item in planned:
            (write / f"{item.file}.sh").write_text(item.text)
        (write / "chain.sh").write_text(chain_script(planned))
        print(f"{write}: {len(planned)} scripts and chain.sh")
    else:
        for item in planned:
            print(f"==> {item.name} <==", item.text, sep="\n")
    _check(planned, profile)


def _show(planned: list[Any], profile: Profile) -> None:
    from rich.table import Table

    from insightv.cli.runs import console

    table = Table(title="jobs", title_justify="left")
    for heading in ("job", "after", "processes", "nodes", "GPUs", "cores", "minutes"):
        table.add_column(heading)
    total = 0.0
    for item in planned:
        asked, job = item.resources, item.job
        wide = job.count if job.array else job.nodes
        total += wide * asked.gpus * asked.minutes / 60
        processes = job.count if job.array else job.nodes * job.tasks
        table.add_row(
            item.name,
            ", ".join(item.after),
            str(processes),
            str(wide),
            str(wide * asked.gpus or ""),
            str(processes * asked.cores),
            str(asked.minutes),
        )
    console().print(table)
    budget = f", of a budget of {profile.budget.gpu_hours:g}" if profile.budget.gpu_hours else ""
    print(f"{len(planned)} jobs; at most {total:.1f} GPU-hours in one attempt of each{budget}")


def _check(planned: list[Any], profile: Profile) -> None:
    """Asks Slurm about each script, where it is.

    Raises:
        UserError: It refuses one.
    """
    import tempfile

    from hpc import slurm

    if not slurm.available():
        print("no Slurm here: the scripts were not checked by sbatch --test-only")
        return
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.sh"
        for item in planned:
            script.write_text(item.text)
            try:
                said = slurm.test_only(script, profile.export)
            except slurm.SlurmError as error:
                print(f"Slurm does not answer ({error.said}): the scripts were not checked")
                return
            if said:
                raise UserError(f"{item.name}: sbatch --test-only refuses it ({said})")
    print(f"sbatch --test-only takes all {len(planned)} scripts")


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    app.command("plan", rich_help_panel="Run")(plan)
    app.command("submit", rich_help_panel="Run")(submit)
