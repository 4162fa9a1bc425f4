"""The command that brings what a chain needs to a cluster whose jobs have no internet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.disk import expanded
from hpc.errors import UserError, one_line
from hpc.needs import absent
from insightv.cli.runs import ChainArgument, Overrides

if TYPE_CHECKING:
    from insightv.config import ModelConfig, QuestionsSection

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
"""Of a model on the hub: no pickles, no code."""


def prefetch(
    chain: ChainArgument,
    overrides: Overrides = None,
    to: Annotated[Path, typer.Option(help="Where models from the hub go.")] = Path("models"),
) -> None:
    """Fetch and check a chain's models and sets; jobs then run with HF_HUB_OFFLINE=1."""
    from insightv.chainfile import checked, resolve
    from insightv.config import NONE
    from insightv.models import digest_of

    config = checked(chain, overrides or ())
    folders: dict[str, Path] = {}
    named: list[str] = []
    for role in ("base", "generator", "judge", "scorer"):
        model = getattr(config.models, role)
        if model.path in ("", NONE):
            continue
        path = model.path
        if path not in folders:
            folders[path] = _model(role, model, to)
        if _is_hub(path):
            model.path = str(folders[path])
            named.append(f"models.{role}.path={folders[path]}")
    check_packages(config.questions)
    resolve(config)
    for path, folder in folders.items():
        print(f"model  {path}: {folder}, digest {digest_of(folder)}")
    for name, what in _sets(config.questions):
        print(f"set    {name}: {what}")
    print("jobs find all of this offline" + (", told so: " + " ".join(named) if named else ""))


def _is_hub(path: str) -> bool:
    return bool(_HUB.fullmatch(path)) and not Path(path).exists()


def _model(role: str, model: ModelConfig, to: Path) -> Path:
    """A model's folder; one on the hub is brought there first, what is there already is kept.

    Raises:
        UserError: It is neither a folder nor to be had.
    """
    from insightv.folders import fingerprint, model_folder

    path, hub = model.path, model.hub
    folder = expanded(model_folder(path)).absolute()
    if hub:
        try:
            fingerprint(folder)
            return folder
        except UserError:  # not there, or a part of it
            pass
    elif _is_hub(path):
        hub, folder = path, (to / path.replace("/", "--")).absolute()
    else:
        return folder
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"models.{role}.path: {path} is no folder here, and HF_HUB_OFFLINE is set; "
            "unset it, on a node with internet"
        )
    revision = model.revision or None
    print(f"model  {hub}: asking the hub for it", flush=True)
    try:
        with _untold_retries():
            snapshot_download(hub, revision=revision, local_dir=folder, allow_patterns=_WANTED)
    except LocalEntryNotFoundError as error:  # the client's word for having no way out
        why = one_line(error.__cause__ or error.__context__ or error)
        raise UserError(
            f"models.{role}.path: {path} is no folder here, and the hub cannot be reached ({why}); "
            f"fetch {hub} on a node with internet"
        ) from None
    except Exception as error:  # the hub's client raises whatever its transport does
        raise UserError(
            f"models.{role}.path: {path} is no folder here, and the hub does not give {hub} "
            f"({type(error).__name__}: {one_line(error)}); mend the name, or try a node with "
            "internet"
        ) from None
    return folder


@contextmanager
def _untold_retries() -> Iterator[None]:
    """Keeps the hub's client from telling each of its tries; how they end is told in one line."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_packages(questions: QuestionsSection) -> None:
    """Looks whether what the question sets are read from can be imported; imports nothing.

    Raises:
        UserError: A package is missing.
    """
    from insightv.demo.sets import SPLITS
    from insightv.questions.making import packages_of

    for split in SPLITS:
        if lacking := absent(packages_of(questions, split)):
            names = ", ".join(package.name for package in lacking)
            raise UserError(f"questions need the package {names}: {lacking[0].install}")


def _asked(questions: QuestionsSection) -> dict[str, int]:
    """How many questions each set is asked for, splits together; without those of none."""
    from insightv.config import SETS
    from insightv.demo.sets import SPLITS

    asked = {
        name: sum(getattr(getattr(questions, name), split) for split in SPLITS) for name in SETS
    }
    return {name: count for name, count in asked.items() if count}


def _sets(questions: QuestionsSection) -> list[tuple[str, str]]:
    """The sets that are asked, with what they are drawn from; reading them proves it is there."""
    from insightv.demo.shapes import easy_vqa_rows
    from insightv.demo.tables import tables
    from insightv.questions.sources import count

    found = []
    for name, asked in _asked(questions).items():
        if name == "shapes":
            pictures = {path for split in ("train", "test") for _, _, path in easy_vqa_rows(split)}
            absent = [path for path in pictures if not path.is_file()]
            if absent:
                raise UserError(f"questions.shapes: {absent[0]} is missing; reinstall easy-vqa")
            source = f"{len(pictures):,} pictures of easy-vqa"
        else:
            source = f"{len(list(tables())):,} tables of installed packages"
        found.append((name, f"{asked:,} questions from {source}"))
    for mapping in (*questions.mappings, *questions.held_out_mappings):
        folder = questions.place.of(mapping)
        rows = sum(count(mapping, split, questions.place) or 0 for split in mapping.splits)
        found.append((mapping.name, f"{rows:,} rows in {folder}" if rows else "from the hub"))
    return found
