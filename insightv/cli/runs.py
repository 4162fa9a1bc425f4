"""Commands that make a run and look after it."""

from __future__ import annotations

import getpass
import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from hpc.cluster import Profile
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
_WATCH = 2.0  # seconds between looks
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

        send(chain, read_profile(profile_path(chain.run)), other_image=other_image)
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
    from hpc.driver import drive
    from hpc.executors.local import LocalExecutor
    from hpc.progress import Bars
    from hpc.status import check_sizes

    check_sizes(chain)
    standing = gates.standing(chain)
    if all(standing.values()):
        print(f"{chain.run.path}: complete, nothing to do")
    else:
        need_packages(chain, config)
        chain.run.create()
        _refuse_queued(chain)
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


def need_packages(chain: Chain, config: ChainConfig, profile: Profile | None = None) -> None:
    """Refuses, before any work, a chain whose questions cannot be made for want of a package.

    What an image or a program of the profile's own holds is not to be seen from here.

    Raises:
        UserError: A package is missing that a stage yet to be made reads its questions from.
    """
    from hpc import gates
    from insightv.cli.prefetch import check_packages

    elsewhere = profile is not None and (profile.container.image or profile.program)
    if chain.image or elsewhere:
        return
    standing = gates.standing(chain)
    if not all(made for name, made in standing.items() if name.startswith("questions-")):
        check_packages(config)


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


def _refuse_queued(chain: Chain) -> None:
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
    from hpc import gates
    from hpc.config import dump
    from hpc.disk import write_atomic
    from hpc.rundir import Chain
    from insightv.chain import SUMMARIES

    text, path = dump(config), chain.run.chain_file
    if path.exists() and path.read_text() == text:
        return
    if not held and chain.run.locked():
        raise UserError(f"{chain.run.path}: another process runs this chain; wait for it")
    if not remake:
        lasting = [stage for name, stage in chain.stages.items() if name not in SUMMARIES]
        try:
            gates.refuse_changes(Chain(lasting, chain.run, chain.command))
        except UserError as error:
            raise UserError(
                f"{error}{_asked(path, config)}; `insightv run … --run-dir NEW "
                f"--reuse {chain.run.path}` takes over what stays equal"
            ) from None
    for name in SUMMARIES:
        # They only tell what the other stages made, and follow any change.
        manifest = chain.run.read_manifest(name)
        if manifest is not None and manifest["hash"] != chain.identity(name):
            chain.run.remove(name, chain.stages[name].outputs)
    write_atomic(path, text)


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
    lines: Annotated[int, typer.Option("--lines", "-n", help="So many from the end.")] = 40,
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
    for name in names:
        for log in [*_last_attempt(chain.run.logs(name)), *_gate_logs(chain, name, whole)]:
            said = log.read_text(errors="replace").splitlines()
            if whole:
                print(f"==> {log} <==", *map(_plain, said[-lines:]), sep="\n")
            elif said:
                print(f"{name}: {_plain(said[-1])[:120]}")


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


def _plain(line: str) -> str:
    """The line without control characters, which could rewrite the terminal."""
    return "".join(c if c.isprintable() or c == "\t" else " " for c in line)


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
        _refuse_queued(chain)
    found = sweep(chain, plan=plan, logs=with_logs, data=data)
    for item in found:
        print(f"{item.bytes / 2**20:10.2f} MiB  {item.what:12} {item.path}")
    total = sum(item.bytes for item in found) / 2**20
    print(f"{total:10.2f} MiB  {'to be deleted' if plan else 'deleted'}")


def work(run_dir: Path, stage: str) -> int:
    """Payload of one worker."""
    from hpc.control import payload

    # The driver, or the gate, repeats the last line of the log as the reason it stops.
    return payload(opened(run_dir), ["work", stage])


def gate(
    run_dir: Path,
    stage: str,
    attempt: Annotated[int, typer.Argument()] = 0,
    first: Annotated[int, typer.Argument()] = 0,
) -> int:
    """Payload of a gate."""
    from hpc.control import payload

    return payload(opened(run_dir), ["gate", stage, str(attempt), str(first)])


def preflight(run_dir: Path, stages: Annotated[list[str] | None, typer.Argument()] = None) -> int:
    """Payload of the first job on a cluster."""
    from hpc.control import payload

    return payload(opened(run_dir), ["preflight", *(stages or ())])


def gpus() -> int:
    """Whether torch computes on GPUs here: 0 and what it sees, or 1 and what it is."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} ({build}) sees no GPU")
        return 1
    count = torch.cuda.device_count()
    print(f"torch {torch.__version__} ({build}) sees {count}, {torch.cuda.get_device_name(0)}")
    return 0


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    commands: tuple[tuple[str, Any], ...] = (
        ("run", run),
        ("status", status),
        ("logs", logs),
        ("cancel", cancel),
        ("retry", retry),
        ("clean", clean),
    )
    for name, command in commands:
        app.command(name, rich_help_panel="Run")(command)
    app.command("work", hidden=True)(work)
    app.command("gate", hidden=True)(gate)
    app.command("preflight", hidden=True)(preflight)
    app.command("gpus", hidden=True)(gpus)
