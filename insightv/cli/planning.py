"""The command that shows what a submission would queue, and writes it for people."""

from __future__ import annotations

import difflib
import fnmatch
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from insightv.cli.cluster import ProfileOption
from insightv.cli.runs import (
    ChainArgument,
    Overrides,
    RemakeOption,
    RunOption,
    console,
    refuse_changed,
    save,
)

if TYPE_CHECKING:
    from rich.table import Table

    from hpc.cluster import Profile
    from hpc.planning import Planned
    from hpc.rundir import Chain
    from insightv.config import ChainConfig


_UNHELD = "no Slurm answers here: the chain was not held against a cluster"
_FEW = {0: "none", 1: "one"}


def plan(
    chain: ChainArgument,
    overrides: Overrides = None,
    cluster: ProfileOption = ...,  # type: ignore[assignment]
    run_dir: RunOption = None,
    remake: RemakeOption = False,
    write: Annotated[
        Path | None, typer.Option(metavar="D", help="Write the scripts to this folder.")
    ] = None,
    scripts: Annotated[
        bool, typer.Option("--scripts", help="Show each job's exact sbatch text as well.")
    ] = False,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Only make the run directory that such scripts work in."),
    ] = False,
) -> None:
    """Show every job, what it waits for, what it may cost and what it will make."""
    from hpc import slurm
    from hpc.admission import admit, fits
    from hpc.cluster import read_profile
    from hpc.facts import Facts
    from hpc.planning import plan_of
    from hpc.rundir import RunDir
    from hpc.submission import fitted
    from insightv.chain import assemble
    from insightv.chainfile import missing, read
    from insightv.cli.rehearsal import table
    from insightv.rehearsal import forecast_of

    profile, config = read_profile(cluster), read(chain, overrides or (), fetched=prepare)
    run = run_dir or Path("runs") / chain.stem
    assembled = assemble(config, RunDir(run))
    if prepare:
        _prepare(assembled, config, profile, remake)
        return
    if not remake:
        refuse_changed(assembled, config)
    if write is not None:
        given = [str(chain), *(overrides or ()), *(["--remake"] if remake else ())]
        _write(assembled, profile, write, run, given, cluster)
        return
    there = slurm.answers()
    facts = Facts()
    profile = fitted(profile, facts) if there else profile
    told = fits(assembled, profile)
    planned = plan_of(assembled, profile)
    if not planned:
        print(f"{assembled.run.path}: complete, nothing to do")
        return
    console().print(_jobs(assembled, planned, profile))
    console().print(table(forecast_of(config, assembled, profile)))
    print(_cost(planned, profile))
    for note in (*_idle(assembled, planned), *_together(told)):
        print(note)
    for name in profile.stages:
        if fnmatch.filter(assembled.stages, name):
            continue
        near = difflib.get_close_matches(name, assembled.stages, 1, 0.0)[0]
        print(f"note: the profile's stages.{name} is no stage of this chain; did you mean {near}?")
    for role, model in missing(config).items():
        lost = ", so no bytes of trained models are forecast" if role == "base" else ""
        print(
            f"note: models.{role}: {model.path} is not here yet{lost}; `insightv prefetch` "
            f"fetches {model.hub}"
        )
    sys.stdout.flush()  # before what Slurm may refuse
    try:
        print(admit(planned, profile, facts=facts) if there else _UNHELD)
    finally:  # what Slurm refuses is what one wants to read
        for item in planned if scripts else ():
            print(f"==> {item.name} <==", item.text, sep="\n")


def _idle(chain: Chain, planned: Sequence[Planned]) -> Iterator[str]:
    """Names the jobs that ask for more GPUs than each of their processes computes on."""
    wide: dict[tuple[int, int], list[str]] = {}
    for item in planned:
        stage = chain.stages.get(item.job.stage)
        if stage is None or stage.distributed or item.job.role != "work" or stage.gpus is None:
            continue
        if item.resources.gpus > stage.gpus:
            wide.setdefault((item.resources.gpus, stage.gpus), []).append(stage.name)
    for (given, used), names in wide.items():
        many = f"{given} GPU{'s' * (given > 1)}"
        kind = f", or `gpus: {used}` for all of a kind" if used else ""
        yield (
            f"note: {_first(names)}: {many} for each process, which computes on "
            f"{_FEW.get(used, used)}; write `stages: {{{names[0]}: {{gpus: {used}}}}}` in the "
            f"profile{kind}"
        )


def _together(told: Mapping[str, str]) -> Iterator[str]:
    """What stages tell of what they get, once where they tell the same."""
    for said in dict.fromkeys(told.values()):
        yield f"{_first([name for name in told if told[name] == said])}: {said}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _prepare(chain: Chain, config: ChainConfig, profile: Profile, remake: bool) -> None:
    """Makes a run directory whose jobs somebody submits by hand: what `submit` writes first."""
    from hpc.executors.batch import write_host
    from hpc.facts import Facts
    from hpc.naming import make_id
    from hpc.submission import fitted, keep_profile, pinned

    # Before anything is written: it asks for the image and for Slurm.
    run, facts = chain.run, Facts(profile.submit.patience)
    profile = fitted(pinned(chain, profile), facts)
    run.create()
    with run.lock():
        save(chain, config, remake, held=True)
        keep_profile(run, profile, facts)
        make_id(run)
        write_host(run.path / "slurm")
        run.add_provenance(chain.packages, chain.image, chain.images)


def _write(
    chain: Chain, profile: Profile, folder: Path, run: Path, given: Sequence[str], cluster: Path
) -> None:
    """Writes the scripts; they name no folder of this machine but those given here."""
    from hpc.admission import fits
    from hpc.disk import make_folder
    from hpc.executors.batch import write_host
    from hpc.planning import chain_script, plan_of
    from hpc.submission import pinned

    fits(chain, profile)
    profile = pinned(chain, profile, other_image=True)
    # Whoever submits by hand has the command on the path, which jobs inherit.
    chain.command = ["insightv"]
    planned = plan_of(chain, profile, by_hand=True)
    if not planned:
        print(f"{chain.run.path}: complete, nothing to write")
        return
    plan = f"insightv plan {shlex.join(given)} --cluster {shlex.quote(str(cluster))}"
    make_folder(folder)
    host = write_host(folder)
    for other in folder.glob("host-*"):
        if other != host:  # an earlier version's
            shutil.rmtree(other)
    for item in planned:
        (folder / f"{item.file}.sh").write_text(item.text)
    script = chain_script(
        chain.run,
        planned,
        default=str(run),
        prepare=f'{plan} --run-dir "$run" --prepare',
        about=f"Written by: {plan} --write {shlex.quote(str(folder))}",
    )
    path = folder / "chain.sh"
    path.write_text(script)
    path.chmod(0o755)
    print(f"{folder}: {len(planned)} scripts and chain.sh, which submits them")


def _jobs(chain: Chain, planned: Sequence[Planned], profile: Profile) -> Table:
    """A row for each stage's work; what its gate asks for stands below."""
    from rich.table import Table

    first, *_, gate = planned
    several = bool(first.job.also)
    table = Table(title="jobs", title_justify="left")
    table.add_column("stage")
    table.add_column("waits for", ratio=1)
    for heading in ("processes", "nodes", "GPUs", "cores", "minutes"):
        table.add_column(heading, justify="right")
    if several:
        table.add_column("image")
    behind: dict[str, set[str]] = {}
    for item in planned:
        job, asked = item.job, item.resources
        if job.role == "gate":
            continue
        waits = _waits(chain, job.stage, behind) if job.role == "work" else []
        processes = job.count if job.array else job.nodes * job.tasks
        table.add_row(
            job.stage,
            ", ".join(waits) or ("" if item is first else first.job.stage),
            str(processes),
            str(_nodes(item)),
            str(_nodes(item) * asked.gpus or ""),
            str(processes * asked.cores),
            str(asked.minutes),
            *([_image(item, profile)] if several else ()),
        )
    asked = gate.resources
    table.caption = (
        f"behind each stage a gate of {asked.cores} core and {asked.minutes} minutes, for which "
        f"others wait; job names: {first.name}, …, {gate.name}"
    )
    table.caption_justify = "left"
    return table


def _image(item: Planned, profile: Profile) -> str:
    if item.job.also:
        return "each"
    return Path(profile.container_of(item.resources).image).name or "none"


def _waits(chain: Chain, stage: str, behind: dict[str, set[str]]) -> list[str]:
    """The stages a stage waits for, without those that these wait for themselves.

    Args:
        chain: The chain.
        stage: One that is planned.
        behind: For each stage planned before, all that it waits for; the stage is added.
    """
    parents = [parent for parent in chain.stages[stage].parents if parent in behind]
    implied = set[str]().union(*(behind[parent] for parent in parents))
    behind[stage] = implied.union(parents)
    return [parent for parent in parents if parent not in implied]


def _nodes(item: Planned) -> int:
    return item.job.count if item.job.array else item.job.nodes


def _cost(planned: Sequence[Planned], profile: Profile) -> str:
    total = sum(_nodes(item) * item.resources.gpus * item.resources.minutes for item in planned)
    limit = profile.budget.gpu_hours
    budget = f", of a budget of {limit:g}" if limit else ""
    return f"{len(planned)} jobs; at most {total / 60:.1f} GPU-hours in one attempt of each{budget}"
