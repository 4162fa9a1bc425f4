"""Chain files: read, checked, and held against what is on this machine."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc.config import load
from hpc.disk import expanded
from hpc.errors import UserError
from insightv.config import NONE, ChainConfig, ModelConfig, QuestionsSection
from insightv.engines.config import EngineConfig
from insightv.engines.server.config import read_key
from insightv.folders import EMBEDDED, fingerprint, is_gguf, model_folder
from insightv.prompting import FOLDER, load_prompts
from insightv.questions import load_set, sources

_TEXT = re.compile(r"(models\.\w+\.(?:path|prompts))=\s*\Z")


def read(path: Path, overrides: Sequence[str] = (), fetched: bool = True) -> ChainConfig:
    """Reads and checks a chain file, and resolves what depends on this machine.

    Args:
        path: The chain file.
        overrides: ``key=value`` over what it says.
        fetched: As for `resolve`.

    Raises:
        UserError: An unknown key, an impossible value, a folder that is no model.
    """
    config = checked(path, overrides)
    resolve(config, fetched)
    return config


def checked(path: Path, overrides: Sequence[str] = ()) -> ChainConfig:
    """Reads a chain file and checks its values; models and prompts are not looked at.

    Raises:
        UserError: An unknown key, or an impossible value.
    """
    # An empty value is none in YAML; for what names a model, empty means something.
    config = load(ChainConfig, path, [_TEXT.sub(r"\1=''", o) for o in overrides])
    _load_sets(config.questions, path.parent)
    _bound_pictures(config.questions)
    for key, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value}: give a finite number")
    _validate(config)
    if not 0 <= config.error_limit <= 1:
        raise UserError(f"error_limit is {config.error_limit}: give a share from 0 to 1")
    if config.engine.kind == "server" and config.engine.server.url:
        raise UserError(
            "engine.server.url: a server that runs has one model, and this chain trains others; "
            "give engine.server.command, and the url as models.generator.engine.server.url"
        )
    return config


def resolve(config: ChainConfig, fetched: bool = True) -> None:
    """Resolves what depends on this machine: folders, prompts, and what models hold.

    Args:
        config: The chain's, which is changed.
        fetched: Whether every model must be here. Else one with a name on the hub may still be
            missing: it is known by that name, which is enough to plan with.

    Raises:
        UserError: A folder that is no model, or a set of prompts that is none.
    """
    base = config.models.base
    if base.path in ("", NONE):
        raise UserError("models.base.path: give a model folder, or tiny")
    for role in ("base", "generator", "judge", "scorer"):
        model = getattr(config.models, role)
        _resolve(role, model, base, fetched)
        if model.engine is not None:
            _resolve_key(f"models.{role}.engine", model.engine)
    config.benchmarks.resolve()
    asked = config.questions
    if asked.mappings or asked.held_out_mappings:
        asked.folder = str(expanded(asked.folder).absolute())
    for mapping in (*asked.mappings, *asked.held_out_mappings):
        for name, split in mapping.splits.items():
            looked_for = name != "train" and asked.duplicates != "keep"
            if looked_for or asked.most(mapping, name) != 0:
                split.digest = sources.fingerprint(mapping, name, asked.place)
    for mapping in asked.mappings:
        for name in mapping.splits:
            if asked.most(mapping, name) is None and not sources.files(mapping, name, asked.place):
                raise UserError(
                    f"questions.take: give the sizes of {mapping.name}; what the hub holds of it "
                    "is not known before"
                )


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration with its key; also those in free dictionaries."""
    inner = dataclasses.is_dataclass(config)
    for name, value in (vars(config) if inner else config).items():
        if dataclasses.is_dataclass(value) or (isinstance(value, dict) and value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def folders(config: ChainConfig) -> list[Path]:
    """The folders of this machine that a resolved configuration names: models, prompts, sets."""
    models = config.models
    named = [
        name
        for model in (models.base, models.generator, models.judge, models.scorer)
        for name in (model.path, model.prompts)
    ]
    asked = config.questions
    named += [str(asked.place.of(m)) for m in (*asked.mappings, *asked.held_out_mappings)]
    if config.benchmarks.tasks:
        named += [config.benchmarks.folder, config.benchmarks.include]
    paths = [path for name in dict.fromkeys(named) if (path := Path(name)).is_absolute()]
    return [path.parent if is_gguf(path) else path for path in paths]


def _load_sets(asked: QuestionsSection, beside: Path) -> None:
    """Reads the files of sets; from then on they stand in the configuration itself.

    Raises:
        UserError: A file is missing or wrong.
    """
    for names, mappings in (
        (asked.sets, asked.mappings),
        (asked.held_out, asked.held_out_mappings),
    ):
        for name in names:
            given = expanded(name)
            mappings.append(load_set(beside / given if (beside / given).is_file() else given))
        names.clear()


def _bound_pictures(asked: QuestionsSection) -> None:
    """Lets no set that is read have larger pictures than the chain wants."""
    if asked.longest_side > 0:
        for mapping in asked.mappings:
            mapping.longest_side = min(mapping.longest_side, asked.longest_side)


def _validate(config: ChainConfig) -> None:
    """Lets every section check itself; those of several places are told where they stand."""
    for section in vars(config).values():
        if hasattr(section, "validate"):
            section.validate()
    for owner in ("training", "rounds"):
        for name, section in vars(getattr(config, owner)).items():
            if hasattr(section, "validate"):
                section.validate(f"{owner}.{name}")


def _resolve_key(name: str, engine: EngineConfig) -> None:
    """Looks that the key of servers that run can be read, before anything is queued.

    Raises:
        UserError: It cannot be.
    """
    server = engine.server
    if engine.kind == "server" and server.key_file:
        read_key(server.key_file, f"{name}.server.key_file")
        server.key_file = str(expanded(server.key_file).absolute())


def missing(config: ChainConfig) -> dict[str, ModelConfig]:
    """Models that are still to be fetched from the hub, by role; a folder counts once."""
    found: dict[str, tuple[str, ModelConfig]] = {}
    for role, model in vars(config.models).items():
        if model.hub and not Path(model.path).exists():
            found.setdefault(model.path, (role, model))
    return dict(found.values())


def _resolve(role: str, model: ModelConfig, base: ModelConfig, fetched: bool) -> None:
    """Makes a model's paths absolute and notes what the folder holds."""
    if model.path == NONE:
        if role != "judge":
            raise UserError(f"models.{role}.path: only the judge can be none")
        return
    if not model.path:
        model.path, model.prompts = base.path, model.prompts or base.prompts
        model.hub, model.revision = base.hub, base.revision
    if not model.prompts:
        model.prompts = EMBEDDED if model.path == EMBEDDED else "default"
    if model.path != EMBEDDED:
        model.path = str(expanded(model.path).absolute())
    if is_gguf(Path(model.path)) and role != "judge":
        raise UserError(f"models.{role}.path: a GGUF is read as text alone, so as the judge alone")
    if is_gguf(Path(model.path)) and (model.engine is None or model.engine.kind != "server"):
        raise UserError(
            f"models.{role}.path: a GGUF is run by a server alone; give models.{role}.engine "
            "with kind: server and server: {command: [llamacpp]}"
        )
    load_prompts(model.prompts)
    if Path(model.prompts).is_dir() and not (FOLDER / model.prompts).is_dir():
        model.prompts = str(Path(model.prompts).absolute())
    absent = bool(model.hub) and not Path(model.path).exists()
    if absent and not fetched:
        model.digest = f"{model.hub}@{model.revision}"
        return
    try:
        model.digest = fingerprint(model_folder(model.path))
    except UserError as error:
        told = f", or let `insightv prefetch` fetch {model.hub}" if absent else ""
        raise UserError(f"models.{role}.path: {error}{told}") from None
