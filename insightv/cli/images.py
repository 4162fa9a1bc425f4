"""Commands for container images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.errors import UserError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hpc.images import Definition
    from hpc.site import Finding

app = typer.Typer(
    help="Build, check and sign the container images that payloads run in.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="cpu, train, serve, or the path of a definition.")
]
ImageArgument = Annotated[Path, typer.Argument(metavar="SIF", help="An image.")]
SourceOption = Annotated[
    Path, typer.Option(help="This package's folder, with containers and pyproject.toml.")
]
BaseOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]IMAGE",
        help="A base image here (SIF, folder, docker archive), not a registry's.",
    ),
]


@app.command()
def build(
    name: NameArgument,
    to: Annotated[Path | None, typer.Option(help="The image; by default NAME.sif.")] = None,
    fakeroot: Annotated[bool, typer.Option("--fakeroot", help="As if by root.")] = False,
    offline: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Take everything from a bundle.")
    ] = None,
    base: BaseOption = None,
    source: SourceOption = Path(),
    compression: Annotated[
        str, typer.Option(help="gzip: any kernel; zstd: faster, Linux 4.14 and newer.")
    ] = "gzip",
) -> None:
    """Build an image; its digest and contents (SPDX) are written beside it."""
    from hpc import images

    if compression not in ("gzip", "zstd"):
        raise UserError(f"--compression is {compression!r}: use gzip or zstd")
    definition, target = _definition(name, source), to or Path(f"{Path(name).stem}.sif")
    _refuse(images.preflight(definition, target, fakeroot))
    level = " -Xcompression-level 6" if compression == "zstd" else ""
    words = ["--mksquashfs-args", f"-comp {compression}{level}"]
    say = _progress()
    bases = _bases(base or ())
    summed = images.build(definition, target, source, say, fakeroot, bases, offline, words)
    size = target.stat().st_size / 2**20
    print(f"{target}: {size:.0f} MiB, sha256 {summed}")


@app.command()
def bundle(
    name: NameArgument,
    to: Annotated[Path | None, typer.Option(help="The folder; by default NAME-bundle.")] = None,
    base: BaseOption = None,
    source: SourceOption = Path(),
) -> None:
    """Collect what a build without internet needs, on a machine that has it."""
    from hpc import images

    definition, folder = _definition(name, source), to or Path(f"{Path(name).stem}-bundle")
    images.bundle(definition, folder, source, _bases(base or ()), _progress())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    print(f"{folder}: {size:.0f} MiB; there: insightv image build {name} --offline {folder}")


@app.command()
def check(
    image: ImageArgument,
    run_dir: Annotated[Path, typer.Option(help="Where runs will lie.")] = Path(),
    gpus: Annotated[int, typer.Option(min=0, help="GPUs that should be seen.")] = 0,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="PROFILE", help="Binds and options of its `container` entry."),
    ] = None,
    imports: Annotated[
        str, typer.Option(help="Modules that must load; by default what the image says.")
    ] = "",
) -> int:
    """Look from inside an image at the node it will be used on, and say it in one table."""
    import os
    import subprocess
    from dataclasses import replace

    from hpc.cluster import read_profile
    from hpc.container import Container, command, pin, refuse_broken
    from hpc.disk import make_folder

    refuse_broken(image)
    profile = read_profile(cluster) if cluster is not None else None
    asked = profile.container if profile is not None else Container()
    place = make_folder(run_dir.absolute())
    pinned = pin(replace(asked, image=str(image), sha256=_kept_digest(image)))
    words = ["python", "-m", "insightv.inspection", "--run", str(place), "--gpus", str(gpus)]
    words += ["--home", os.environ.get("HOME", "")]
    words += ["--imports", imports] if imports else []
    done = subprocess.run(
        command(pinned, place, words, gpus, "check"), capture_output=True, text=True
    )
    findings = [*_findings(done.stdout)]
    if not findings:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"{image}: cannot be looked into: {last}; see docs/containers.md")
    _table(findings, f"{image}, sha256 {pinned.sha256[:16]}…")
    wrong = sum(finding.level == "wrong" for finding in findings)
    print(f"{wrong} to mend" if wrong else f"{image}: nothing to mend")
    return 2 if wrong else 0


@app.command()
def sign(
    image: ImageArgument,
    key: Annotated[int, typer.Option(help="Which key of `apptainer key list --secret`.")] = 0,
) -> None:
    """Sign an image with the site's key; its digest changes and is written anew."""
    from hpc import images
    from hpc.container import refuse_broken

    refuse_broken(image)
    _apptainer("sign", "--keyidx", str(key), str(image))
    print(f"{image}: signed, sha256 {images.describe(image, image, lambda said: None)}")


@app.command()
def verify(image: ImageArgument) -> None:
    """Verify an image's signature, and its digest where that lies beside it."""
    from hpc.container import identify, refuse_broken

    summed, kept = identify(image)[0], _kept_digest(image)
    if kept and kept != summed:
        raise UserError(f"{image}: sha256 is {summed}, {image}.sha256 says {kept}; copy it again")
    refuse_broken(image)
    _apptainer("verify", str(image))
    print(f"{image}: verified, sha256 {summed}")


def _definition(name: str, source: Path) -> Definition:
    from hpc.images import find

    return find(name, source / "containers")


def _bases(given: Sequence[str]) -> dict[str, Path]:
    """``devel=PATH`` for an image of several stages; ``PATH`` alone is its ``base``."""
    named = (word.rpartition("=") for word in given)
    return {name or "base": Path(path) for name, _, path in named}


def _refuse(findings: Sequence[Finding]) -> None:
    """Shows what a build needs; the first that is wrong ends it."""
    for finding in findings:
        print(finding, flush=True)
    for finding in findings:
        if finding.level == "wrong":
            raise UserError(f"{finding.about}: {finding.said}")


def _progress() -> Callable[[str], None]:
    """Lines on a terminal take each other's place; a log keeps them all."""
    import sys

    def say(said: str) -> None:
        line = printable(said)
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line[:100]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    return say


def _kept_digest(image: Path) -> str:
    """The digest that lies beside an image; empty where none does.

    Raises:
        UserError: What lies there is none.
    """
    kept = image.with_name(f"{image.name}.sha256")
    if not kept.is_file():
        return ""
    found = re.match(r"[0-9a-f]{64}\b", kept.read_text(errors="replace"))
    if found is None:
        raise UserError(f"{kept} holds no digest; copy it again, or write it with sha256sum")
    return found[0]


def _findings(text: str) -> Iterator[Finding]:
    from hpc.site import Finding

    for line in text.splitlines():
        level, _, rest = line.partition("\t")
        about, tab, said = rest.partition("\t")
        if tab and level in ("ok", "note", "wrong"):
            yield Finding(level, about, said)


def _table(findings: Sequence[Finding], title: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from insightv.cli.runs import console

    table = Table(title=title, title_justify="left")
    for heading in ("", "what", "found"):
        table.add_column(heading)
    colours = {"ok": "green", "note": "yellow", "wrong": "red"}
    for finding in findings:
        level = Text(finding.level, style=colours[finding.level])
        table.add_row(level, finding.about, Text(finding.said))
    console().print(table)


def _apptainer(*words: str) -> None:
    import subprocess

    try:
        status = subprocess.run(["apptainer", *words]).returncode
    except FileNotFoundError:
        raise UserError("apptainer is not here; install it, or load its module") from None
    if status:
        raise UserError(f"apptainer {words[0]} failed; see above and `apptainer key list`")
