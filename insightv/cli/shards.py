"""Commands on shards: files of rows, of a run or copied out of one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Look into shards, verify them, mend them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PathArgument = Annotated[
    Path, typer.Argument(metavar="PATH", help="A shard, a folder of shards, a stage's or a run's.")
]


def _shards(path: Path) -> list[Path]:
    """The shards a path means; those of every stage for a run directory."""
    from hpc.shards import shard_paths

    if not (path / "stages").is_dir():
        return shard_paths(path)
    return [shard for shards in _of_run(path).values() for shard in shards]


def _of_run(run: Path) -> dict[Path, list[Path]]:
    """Each stage's shards; of a stage that is not finished those that are complete, maybe none."""
    from hpc.shards import list_folder, shard_path, shard_paths

    found = {}
    for folder in sorted(run.glob("stages/*/shards")):
        if not (folder.parent / "manifest.json").exists():
            complete = sorted(list_folder(folder).complete)
            found[folder.parent] = [shard_path(folder, index) for index in complete]
        elif any(folder.glob("0*")):  # else `clean` has deleted them
            found[folder.parent] = shard_paths(folder)
    return found


@app.command()
def verify(path: PathArgument) -> int:
    """Read every byte and compare it with the sidecars."""
    from hpc.frames import ShardError
    from hpc.shards import verify as check

    total: Counter[str] = Counter()
    damaged: list[ShardError] = []
    for shard in _shards(path):
        try:
            sidecar = check(shard)
        except ShardError as error:
            damaged.append(error)
            continue
        total.update(shards=1, rows=sidecar.rows, bytes=sidecar.bytes, errors=sidecar.errors)
    for known in damaged[:-1]:
        typer.echo(f"insightv: {known}", err=True)
    if damaged:
        raise damaged[-1]
    print(
        f"{total['shards']:,} shards whole: {total['rows']:,} rows, {total['errors']:,} errors, "
        f"{total['bytes'] / 2**20:.2f} MiB"
    )
    if skipped := sum(not shards for shards in _of_run(path).values()):
        print(f"{skipped} stages skipped: not finished, no complete shard yet")
    return 0


@app.command()
def cat(path: PathArgument) -> None:
    """Print the rows, one JSON object a line."""
    from hpc.shards import cat as rows

    for shard in _shards(path):
        for row in rows(shard):
            print(row)


@app.command()
def repair(
    path: PathArgument,
    source: Annotated[
        Path | None,
        typer.Option(help="The input shard, to name every lost key; found by itself in a run."),
    ] = None,
) -> None:
    """Save what is whole of damaged shards.

    Their run makes the rest when it is gone on with.
    """
    from hpc.shards import repair as mend

    damaged = 0
    for shard in _shards(path):
        found = mend(shard, source or _input_of(shard))
        if not found.damaged:
            continue
        damaged += 1
        _reopen(shard)
        lost = len(found.lost) + found.unnamed
        print(f"{shard}: kept {found.kept:,} keys, lost {lost:,}", *found.lost[:20])
    if damaged:
        print(f"{damaged} shards mended; `insightv retry` makes what was lost")
    else:
        print("nothing is damaged")


def _input_of(shard: Path) -> Path | None:
    """The shard this one was made from, where it lies in a run that knows."""
    run = _run_of(shard)
    if run is None:
        return None
    from insightv.chain import build

    stage = build(run).stages.get(shard.parent.parent.name)
    if stage is None or stage.kind != "map":
        return None
    first = run / "stages" / next(iter(stage.inputs.values())) / "shards" / shard.name
    return first if first.exists() else None


def _reopen(shard: Path) -> None:
    """A stage with a mended shard is not complete any more."""
    if (run := _run_of(shard)) is not None:
        from hpc.rundir import RunDir

        RunDir(run).manifest(shard.parent.parent.name).unlink(missing_ok=True)


def _run_of(shard: Path) -> Path | None:
    """The run directory of ``RUN/stages/STAGE/shards/NNNNN.jsonl.zst``."""
    parents = shard.absolute().parents
    inside = len(parents) > 3 and parents[2].name == "stages"
    return parents[3] if inside and (parents[3] / "chain.yaml").is_file() else None
