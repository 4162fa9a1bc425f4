"""Single trainings, outside of a run: ``insightv train sft|dpo``."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from hpc.stages import Counts, Mapper, Row
    from insightv.pictures import Pictures
    from insightv.training.config import DPOConfig

app = typer.Typer(
    help="Train one model on a set of one's own.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_REQUEUE = 75

DataArgument = Annotated[Path, typer.Argument(metavar="DATA", help="A folder of shards.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="epochs=1 beta=0.2 …")
]
ModelOption = Annotated[str, typer.Option(help="The model to start from: a folder, or tiny.")]
OutOption = Annotated[Path, typer.Option(help="Folder of the trained model.")]
PicturesOption = Annotated[
    list[Path], typer.Option(help="A folder of picture packs; may be given several times.")
]
ConfigOption = Annotated[Path | None, typer.Option(help="A YAML file of the training's keys.")]


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A training's checkpoints/step-… folder.")
    ],
    model: Annotated[str, typer.Option(help="The model that training began from.")],
    out: Annotated[Path, typer.Option(help="Folder of the model to write.")],
) -> None:
    """Make a model folder of a training that has not ended."""
    from insightv.folders import model_folder
    from insightv.training.convert import convert as write

    position = write(checkpoint, model_folder(model), out)
    print(f"{out}  the model behind step {position.step}")


@app.command()
def sft(
    data: DataArgument,
    overrides: OverridesArgument = None,
    model: ModelOption = "tiny",
    out: OutOption = Path("model"),
    pictures: PicturesOption = [],  # noqa: B006 (typer reads it, nobody writes it)
    config: ConfigOption = None,
) -> int:
    """Fine-tune on training samples; the same command resumes."""
    from hpc.config import load
    from insightv.folders import model_folder
    from insightv.training.config import SFTConfig

    settings = load(SFTConfig, config, overrides or ())
    settings.validate()
    data, folder, packs = _folder(data), model_folder(model), _pictures(pictures)
    with _Alone(out).at_work() as place:
        from insightv.training.trainer import train_sft

        return _ended(train_sft(settings, folder, data, packs, out, place), out, place)


@app.command()
def dpo(
    data: DataArgument,
    overrides: OverridesArgument = None,
    model: ModelOption = "tiny",
    reference: Annotated[
        str | None, typer.Option(help="The reference model; by default the one to start from.")
    ] = None,
    out: OutOption = Path("model"),
    pictures: PicturesOption = [],  # noqa: B006
    config: ConfigOption = None,
) -> int:
    """Train on preference pairs; the same command resumes."""
    from hpc.config import load
    from insightv.folders import model_folder
    from insightv.training.config import DPOConfig

    settings = load(DPOConfig, config, overrides or ())
    settings.validate()
    data, folder, packs = _folder(data), model_folder(model), _pictures(pictures)
    tied = model_folder(reference or model)
    with _Alone(out).at_work() as place:
        from insightv.models import digest_of
        from insightv.training.ranks import joined
        from insightv.training.trainer import train_dpo

        with joined(settings) as ranks:
            digest = ranks.first(lambda: digest_of(tied))
            scored = Path(
                ranks.first(
                    lambda: str(_with_reference(settings, data, tied, digest, packs, place))
                )
            )
            done = train_dpo(settings, folder, scored, packs, out, place, digest)
        return _ended(done, out, place)


def _folder(data: Path) -> Path:
    """The folder of shards, also where a stage's own was named.

    Raises:
        UserError: There are none.
    """
    from hpc.shards import shard_paths

    return shard_paths(data)[0].parent


def _pictures(folders: list[Path]) -> Pictures:
    from insightv.pictures import Pictures

    for folder in folders:
        if not any(folder.glob("*.zip")):
            raise UserError(f"--pictures {folder}: no picture packs (*.zip) here")
    return Pictures(folders)


def _ended(counts: Counts | None, out: Path, place: _Alone) -> int:
    if counts is None:
        if place.lead:
            print(f"insightv: saved; the same command goes on with {out}", file=sys.stderr)
        return _REQUEUE
    if not place.lead:
        return 0
    told = ("rows", "step", "samples", "first_loss", "last_loss", "dropped_too_long")
    print(f"{out}: " + ", ".join(f"{name} {counts[name]}" for name in told if name in counts))
    return 0


def _with_reference(
    settings: DPOConfig,
    data: Path,
    reference: Path,
    digest: str,
    pictures: Pictures,
    place: _Alone,
) -> Path:
    """The pairs with this reference model's log-probabilities; computed where they lack them."""
    from hpc.config import digest as digest_of
    from hpc.config import shaping
    from hpc.shards import read_rows, sidecars, write_groups
    from insightv.training.config import ReferenceConfig
    from insightv.training.reference import Reference

    first = next(read_rows(data), None)
    if first is None:
        raise UserError(f"{data}: there are no pairs")
    if first.get("reference_model") == digest:
        return data
    # As in training, so that the first step's margins are 0.
    config = ReferenceConfig(settings.precision, settings.max_length, device=settings.device)
    files = [sidecar.sha256 for sidecar in sidecars(data).values()]
    made = place.directory / f"reference-{digest_of([digest, shaping(config), files])}"
    if not made.is_dir():
        part = made.with_name(made.name + ".part")
        mapper = Reference(reference, config, pictures)
        write_groups(part, asyncio.run(_mapped(mapper, data, place)))
        part.rename(made)
    return made


async def _mapped(mapper: Mapper, data: Path, place: _Alone) -> list[tuple[str, list[Row]]]:
    """Every group of a folder of shards through a mapper, as many at once as it takes."""
    from hpc.shards import read_groups, shard_paths

    groups = [group for path in shard_paths(data) for group in read_groups(path)]
    room, done = asyncio.Semaphore(mapper.concurrency), 0

    async def one(key: str, rows: list[Row]) -> tuple[str, list[Row]]:
        nonlocal done
        async with room:
            found = key, await mapper(key, {"pairs": rows})
        done += 1
        place.progress(done, len(groups))
        return found

    try:
        return list(await asyncio.gather(*(one(key, rows) for key, rows in groups)))
    finally:
        await mapper.close()


class _Alone:
    """The context of a training that belongs to no run: checkpoints stand beside the model."""

    def __init__(self, out: Path):
        self.out, self.run = out, out.parent
        self.directory = out.with_name(out.name + ".training")
        self.stop = False
        self.lead = int(os.environ.get("RANK", "0")) == 0  # of several, the one that is heard
        self.bar: Progress | None = None

    def shards(self, role: str) -> Path:
        raise KeyError(role)

    def progress(self, done: int, total: int, **numbers: float) -> None:
        if self.bar is not None:
            told = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self.bar.update(self.bar.task_ids[0], completed=done, total=total, description=told)

    def stopping(self) -> bool:
        return self.stop

    def _refuse_strangers(self) -> None:
        """Refuses an output folder that this command has not made: it would be replaced.

        Raises:
            UserError: There is something else.
        """
        begun = (self.directory / "metrics.jsonl").is_file()
        if (
            self.out.exists()
            and not begun
            and not (self.out.is_dir() and not any(self.out.iterdir()))
        ):
            raise UserError(
                f"--out {self.out} is there already, and no training of this command made it; "
                "name a folder that is not there"
            )

    @contextmanager
    def at_work(self) -> Iterator[_Alone]:
        """Shows a bar, and turns the first signal into a wish to stop."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from hpc.disk import make_folder
        from hpc.locking import hold

        def note(number: int, frame: FrameType | None) -> None:
            self.stop = True
            signal.signal(number, before[signal.Signals(number)])

        if self.lead:
            self._refuse_strangers()
        make_folder(self.directory)
        held = hold(self.directory / "lock", 5.0) if self.lead else nullcontext()
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, note) for number in numbers}
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
        try:
            console = Console(stderr=True)
            hidden = not console.is_terminal or not self.lead
            bars = Progress(*columns, console=console, transient=True, disable=hidden)
            with held, bars as bar:
                bar.add_task("", total=None)
                self.bar = bar
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
