"""Commands that make a run on this machine; what other commands need of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from hpc.rundir import Chain
    from insightv.config import ChainConfig

ChainArgument = Annotated[Path, typer.Argument(metavar="CHAIN", help="A chain file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override single keys.")
]
RunOption = Annotated[
    Path | None, typer.Option(help="Where to; by default runs/NAME of the chain file.")
]
RemakeOption = Annotated[
    bool, typer.Option("--remake", help="Make again what another configuration made.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The run directory.")]
ImageOption = Annotated[
    Path | None, typer.Option(metavar="SIF", help="A container image to run every stage in.")
]
OtherImageOption = Annotated[
    bool, typer.Option("--other-image", help="Go on in another image than the run began in.")
]
_PIPE_WIDTH = 132

PRELOAD = ("insightv.chain", "insightv.engines.transformers", "insightv.training.trainer")
"""Imported once by the process that workers are forked from: torch takes seconds to load."""


def run(
    chain: ChainArgument,
    overrides: Overrides = None,
    run_dir: RunOption = None,
    remake: RemakeOption = False,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Take over equal stages of another run; may be repeated."),
    ] = None,
    image: ImageOption = None,
    other_image: OtherImageOption = False,
) -> None:
    """Run a chain here; the same command resumes it."""
    from hpc.rundir import RunDir
    from insightv.chain import assemble
    from insightv.chainfile import read

    config = read(chain, overrides or ())
    target = RunDir(run_dir or Path("runs") / chain.stem)
    assembled = assemble(config, target)
    _contain(assembled, image)
    _drive(assembled, config, remake, reuse or (), other_image)


def retry(directory: RunArgument, other_image: OtherImageOption = False) -> None:
    """Resume a run that stopped or was cancelled, where it was made: here or on its cluster."""
    from hpc.cluster import read_profile
    from hpc.submission import on_cluster, profile_path
    from insightv.chainfile import read

    chain = opened(directory)
    if on_cluster(chain.run):
        from insightv.cli.cluster import send

        profile = read_profile(profile_path(chain.run))
        if other_image:  # than those whose digests the run keeps
            profile.container.sha256, profile.pins = "", {}
        send(chain, profile, other_image=other_image)
        return
    before = chain.run.image()
    _contain(chain, Path(before["path"]) if before else None)
    _drive(chain, read(chain.run.chain_file), other_image=other_image)


def _contain(chain: Chain, path: Path | None) -> None:
    """Lets a chain's stages run inside an image, unless this process is inside one itself.

    Raises:
        UserError: There is no such image, or Apptainer is not here.
    """
    import shutil

    from hpc.container import Container, command, pin
    from hpc.provenance import image

    if path is None or image() is not None:
        return
    if shutil.which("apptainer") is None:
        raise UserError("apptainer is not here; install it, or load its module")
    asked = Container(str(path))
    asked.validate()
    found = pin(asked).seeing(chain.reads)
    chain.image = {"path": found.image, "sha256": found.sha256}
    chain.command = command(found, chain.run.path, found.inside(chain.command))


def _drive(
    chain: Chain,
    config: ChainConfig,
    remake: bool = False,
    donors: Sequence[Path] = (),
    other_image: bool = False,
) -> None:
    """Runs what is missing, then shows what came out."""
    make(chain, config, remake, donors, other_image)
    _show_results(chain)


def make(
    chain: Chain,
    config: ChainConfig,
    remake: bool = False,
    donors: Sequence[Path] = (),
    other_image: bool = False,
) -> None:
    """Runs what is missing, here."""
    from hpc import gates
    from hpc.admission import fits
    from hpc.cluster import Profile, Resources
    from hpc.driver import drive
    from hpc.executors.local import LocalExecutor
    from hpc.needs import refuse_absent
    from hpc.progress import Bars
    from hpc.status import check_sizes

    check_sizes(chain)
    standing = gates.standing(chain)
    if all(standing.values()):
        print(f"{chain.run.path}: complete, nothing to do")
    else:
        refuse_absent(chain)
        # Here every training is one process, and workers have what GPUs there are.
        fits(chain, Profile(gpu=Resources()))
        chain.run.create()
        refuse_queued(chain)
        save(chain, config, remake)
        if donors:
            _take_over(chain, donors)
            standing = gates.standing(chain)
        with Bars() as bars:
            missing = sum(not complete for complete in standing.values())
            bars.console.print(
                f"{chain.run.path}: {missing} of {len(standing)} stages to make", highlight=False
            )
            # What runs in an image has modules of its own; none of this process helps there.
            executor = LocalExecutor(preload=() if chain.image else PRELOAD)
            slots = config.local.slots or None
            drive(chain, executor, bars, slots, remake=remake, other_image=other_image)


def _take_over(chain: Chain, donors: Sequence[Path]) -> None:
    """Takes over what other runs have made already, a line a stage."""
    from hpc.reuse import other_code, reuse
    from insightv.chain import SUMMARIES

    for taken in reuse(chain, donors, skip=SUMMARIES):
        if taken.problem:
            print(f"{taken.stage}: not reused from {taken.donor}: {taken.problem}")
        else:
            print(f"{taken.stage}: reused from {taken.donor}")
    for donor in donors:
        if other_code(chain, donor):
            print(f"{donor}: another version of the code has worked there; hashes do not tell")


def refuse_queued(chain: Chain) -> None:
    """Keeps the work of two masters apart."""
    from hpc.submission import live_jobs, on_cluster

    if on_cluster(chain.run) and live_jobs(chain.run):
        raise UserError(
            f"{chain.run.path}: jobs of this run are queued on the cluster; "
            "wait for them, or `insightv cancel` it first"
        )


def save(chain: Chain, config: ChainConfig, remake: bool, held: bool = False) -> None:
    """Writes the resolved configuration, which is what the workers read.

    Args:
        chain: The chain.
        config: What it was put together from.
        remake: Whether work of another configuration may be replaced.
        held: Whether the caller holds the run's lock.
    """
    from hpc.config import dump
    from hpc.disk import write_atomic
    from insightv.chain import SUMMARIES

    text, path = dump(config), chain.run.chain_file
    if path.exists() and path.read_text() == text:
        return
    if not held and chain.run.locked():
        raise UserError(f"{chain.run.path}: another process runs this chain; wait for it")
    if not remake:
        refuse_changed(chain, config)
    for name in SUMMARIES:
        # They only tell what the other stages made, and follow any change.
        manifest = chain.run.read_manifest(name)
        if manifest is not None and manifest["hash"] != chain.identity(name):
            chain.run.remove(name, chain.stages[name].outputs)
    write_atomic(path, text)


def refuse_changed(chain: Chain, config: ChainConfig) -> None:
    """Refuses a configuration other than the one that finished stages were made with.

    Raises:
        UserError: It is another; which keys, and what to do.
    """
    from hpc import gates
    from hpc.rundir import Chain
    from insightv.chain import SUMMARIES

    lasting = [stage for name, stage in chain.stages.items() if name not in SUMMARIES]
    try:
        gates.refuse_changes(Chain(lasting, chain.run, chain.command))
    except UserError as error:
        raise UserError(
            f"{error}{_asked(chain.run.chain_file, config)}; `insightv run … --run-dir NEW "
            f"--reuse {chain.run.path}` takes over what stays equal"
        ) from None


def _asked(path: Path, config: ChainConfig) -> str:
    """Which keys were changed: a stage may know them under other names."""
    from hpc.config import load, shaping
    from hpc.gates import differences

    try:
        before = shaping(load(type(config), path))
    except UserError:
        return ""  # another version's, which the stage's own words must do for
    changed = differences(before, shaping(config))
    return f"; changed: {', '.join(changed[:5])}" if changed else ""


def _show_results(chain: Chain) -> None:
    from hpc.rundir import read_json
    from insightv.evaluation.results import results_table

    results = read_json(chain.run.results)
    if results:
        console().print(results_table(results))
    page = chain.run.report / "index.html"
    if page.exists():
        print(f"report: {page}")


def console() -> Console:
    """Standard output; a log or a pipe is as wide as the tables want."""
    from rich.console import Console

    found = Console(highlight=False)
    if not found.is_terminal:
        found.width = _PIPE_WIDTH
    return found


def is_run(directory: Path) -> bool:
    """Whether a run lies there; any text can be asked about."""
    try:
        return (directory / "chain.yaml").is_file()
    except OSError:  # too long for a name
        return False


def opened(directory: Path) -> Chain:
    """The chain of a run directory.

    Raises:
        UserError: There is no run.
    """
    from hpc.rundir import RunDir
    from insightv.chain import build

    run = RunDir(directory)
    if not run.chain_file.is_file():
        raise UserError(f"{directory} is no run directory: it has no chain.yaml")
    return build(run)


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    for command in (run, retry):
        app.command(rich_help_panel="Run")(command)
