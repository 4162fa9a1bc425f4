"""Configuration: YAML over dataclasses, with errors that name the nearest key.

Fields shape results unless they are marked with `unhashed`; the digest of the shaping
fields is what a stage is known by. A field that is added once runs exist is marked with
`later`, so that those runs keep their digests.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from hpc.errors import UserError

T = TypeVar("T")

_UNHASHED = {"hashed": False}
_LATER = {"later": True}

_COLONS = re.compile(r"\d:[0-5]?\d")
"""What a number to base 60 holds: looking for it is cheaper than parsing twice."""


def unhashed(default: T) -> T:
    """A dataclass field that never shapes results (a number of workers, say)."""
    made: T = dataclasses.field(default=default, metadata=_UNHASHED)
    return made


def unhashed_factory(factory: Callable[[], T]) -> T:
    """Like `unhashed`, for a mutable default."""
    made: T = dataclasses.field(default_factory=factory, metadata=_UNHASHED)
    return made


def later(default: T) -> T:
    """A dataclass field that came after there were runs; it shapes results like any other.

    It enters `shaping` and `digest` only where its value is not ``default``, so what was made
    before the field existed is known by the same digest as what is made with its default. The
    default has to be what the code did before, and can never be another: a finished run that
    does not name the field means this value.
    """
    made: T = dataclasses.field(default=default, metadata=_LATER)
    return made


def later_factory(factory: Callable[[], T]) -> T:
    """Like `later`, for a mutable default or a whole section."""
    made: T = dataclasses.field(default_factory=factory, metadata=_LATER)
    return made


def load(
    cls: type[T],
    source: Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> T:
    """Reads a configuration: ``cls``' defaults, then ``base``, the file, the overrides.

    Args:
        cls: The dataclass to fill.
        source: A YAML file; its ``extends: other.yaml`` (relative to the file) is merged below it.
            Of several, ``[one.yaml, other.yaml]``, the later one prevails; a file that more than
            one of them extends is merged once, where it comes first.
        overrides: Dotted assignments, ``training.epochs=3``; the value is read as YAML.
        base: Values below those of the file.

    Returns:
        An instance of ``cls``, nested dataclasses and enums included.

    Raises:
        UserError: An unreadable file, an unknown key or a value of the wrong type.
    """
    config = OmegaConf.structured(cls)
    layers = [("base", dict(base))] if base else []
    if source is not None:
        layers += _files(Path(source), ())
    for name, values in layers:
        with _blaming(name):
            _apply(cls, config, values, "")
    for override in overrides:
        with _blaming(f"override `{override}`"):
            _override(cls, config, override)
    with _blaming(str(source) if source is not None else cls.__name__):
        # The configuration was made from cls, so this is an instance of it.
        return cast(T, OmegaConf.to_object(config))


def shaping(config: Any, defaults: bool = False) -> dict[str, Any]:
    """The fields of a dataclass that shape results, recursively, as plain JSON values.

    Args:
        config: The dataclass, or a mapping.
        defaults: `later` fields too that stand at their default: to read configurations beside
            each other, never to be hashed.
    """
    plain = _plain(config, defaults)
    if not isinstance(plain, dict):
        raise TypeError(f"expected a dataclass or a mapping, got {type(config).__name__}")
    return plain


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, first 16 hex digits."""
    text = json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dump(config: Any) -> str:
    """The whole configuration as YAML, unhashed fields included; `load` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _plain(value: Any, defaults: bool = False) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name), defaults)
            for field in dataclasses.fields(value)
            if field.metadata.get("hashed", True)
            and (defaults or not _as_before(field, getattr(value, field.name)))
        }
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item, defaults) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, defaults) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a configuration: {value!r}")


def _as_before(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a `later` field says no more than its absence did."""
    if not field.metadata.get("later", False):
        return False
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    return bool(_plain(value) == _plain(default))


def _files(path: Path, above: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The layers of a file: what it extends first, itself last."""
    if path.resolve() in above:
        raise UserError(f"{path}: extends itself through {above[-1]}; break the circle")
    values = read_yaml(path)
    parents = values.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(
            f"{path}: extends is {parents!r}, expected the path of a YAML file, or a list"
        )
    layers: dict[Path, tuple[str, dict[str, Any]]] = {}
    for parent in parents:
        for name, layer in _files(path.parent / parent, (*above, path.resolve())):
            layers.setdefault(Path(name).resolve(), (name, layer))
    return [*layers.values(), (str(path), values)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and plain values of a YAML file, held against no dataclass.

    Raises:
        UserError: It cannot be read, is not `key: value` lines, or holds a number to base 60.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_colons(text)
        read = OmegaConf.load(io.StringIO(text))
        # A file that holds a list or a lone word is broken too; an empty one is not.
        if not isinstance(read, DictConfig):
            raise UserError(f"{path}: line 1: expected `key: value` lines, found a list")
    except _Problem as problem:
        raise UserError(f"{path}: {problem}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: {line}{error.problem or error.context}; mend the YAML") from None
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a readable YAML file: {_first_line(error)}") from None
    except OSError as error:
        # OmegaConf itself raises OSError for a file that is a lone number.
        told = error.strerror or "expected `key: value` lines"
        raise UserError(f"{path}: {told}; give the path of a configuration file") from None
    values = OmegaConf.to_container(read, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _refuse_colons(text: str) -> None:
    """Refuses what YAML 1.1 takes for a number to base 60.

    ``minutes: 8:00:00`` would be 28,800 minutes, and nobody means that.

    Raises:
        _Problem: There is one.
        yaml.YAMLError: The text is no YAML.
    """
    for node in _scalars(yaml.compose(text, yaml.SafeLoader)) if _COLONS.search(text) else ():
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and ":" in node.value:
            read = yaml.safe_load(node.value)
            raise _Problem(
                f"line {node.start_mark.line + 1}: YAML reads {node.value} as {read:,}, a number "
                "to base 60; give a time as one number (minutes: 480), and quote what is text"
            )


def _scalars(root: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Every scalar of a YAML tree, keys included; what is repeated by an alias comes once."""
    seen: set[int] = set()
    left = [root]
    while left:
        node = left.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            yield node
        elif isinstance(node, yaml.MappingNode):
            left += [part for pair in reversed(node.value) for part in reversed(pair)]
        else:
            left += reversed(node.value)


class _Problem(Exception):
    """What is wrong with a key or its value; `_blaming` adds where it stands."""


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Turns what goes wrong inside into one line that says where it stands."""
    try:
        yield
    except _Problem as problem:
        raise UserError(f"{where}: {problem}") from None
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UserError(f"{where}: {key} has no value; set it, or give {key}=…") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key or ''}: {_first_line(error)}") from None


def _apply(cls: type, config: DictConfig, values: Mapping[str, Any], prefix: str) -> None:
    """Merges plain values into the node of a dataclass.

    Only dataclasses are merged key by key. A list or a free dictionary replaces what was
    there: `terms: {sft: 1.0}` means just that, whatever the default held.
    """
    kind = OmegaConf.get_type(config)
    assert kind is not None
    hints = get_type_hints(kind)
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in hints:
            raise _unknown(cls, path, kind)
        inner = _dataclass_in(hints[name])
        if inner is not None and isinstance(value, Mapping):
            _apply(cls, _descend(cls, config, name, prefix), value, f"{path}.")
            continue
        _check_keys(cls, hints[name], value, path)
        try:
            if isinstance(value, Mapping):
                OmegaConf.update(config, name, {}, merge=False)
            OmegaConf.update(config, name, value, merge=True)
        except OmegaConfBaseException as error:
            expected = _shown(hints[name])
            detail = f" ({_first_line(error)})" if isinstance(value, list | dict) else ""
            raise _Problem(f"{path} is {value!r}, expected {expected}{detail}") from None


def _override(cls: type, config: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    *heads, last = key.strip().replace("[", ".").replace("]", "").split(".")
    if not equals or not all([*heads, last]):
        raise _Problem("expected key=value, as in seed=1")
    try:
        _refuse_colons(text)
        parsed = OmegaConf.from_dotlist([f"value={text}"])
    except yaml.YAMLError:
        raise _Problem("the value is not readable as YAML; quote it") from None
    value = OmegaConf.to_container(parsed, resolve=False)["value"]  # type: ignore[index,call-overload]
    node: Any = config
    prefix = ""
    for head in heads:
        node = _descend(cls, node, head, prefix)
        prefix += f"{head}."
    if dataclasses.is_dataclass(OmegaConf.get_type(node)):
        _apply(cls, node, {last: value}, prefix)
        return
    if not isinstance(node, DictConfig):
        _descend(cls, node, last, prefix)
    _check_keys(cls, node._metadata.element_type, value, f"{prefix}{last}")
    try:
        OmegaConf.update(config, f"{prefix}{last}", value, merge=True)
    except OmegaConfBaseException as error:
        raise _Problem(f"{prefix}{last} is {value!r}: {_first_line(error)}") from None


def _descend(cls: type, node: Any, part: str, prefix: str) -> Any:
    """The child of a node; a section that stands at null is begun."""
    if isinstance(node, ListConfig):
        if not part.isdigit() or int(part) >= len(node):
            raise _Problem(f"{prefix[:-1]} has {len(node)} items, numbered from 0; no {part}")
        return node[int(part)]
    if not isinstance(node, DictConfig):
        raise _Problem(f"{prefix[:-1]} is a value, not a section")
    kind = OmegaConf.get_type(node)
    section = dataclasses.is_dataclass(kind)
    hint = get_type_hints(kind).get(part) if section else node._metadata.element_type
    inner = _dataclass_in(hint)
    if part not in node or node[part] is None:
        if hint is None or (part not in node and inner is None and not section):
            raise _unknown(cls, f"{prefix}{part}", kind)
        if inner is None:
            raise _Problem(f"{prefix}{part} has no value yet; give it whole")
        node[part] = OmegaConf.structured(inner)
    return node[part]


def _check_keys(cls: type, hint: Any, value: Any, path: str) -> None:
    """Refuses unknown keys of dataclasses inside lists and dictionaries."""
    inner = _dataclass_in(hint)
    if isinstance(value, Mapping) and inner is not None:
        hints = get_type_hints(inner)
        for name, item in value.items():
            if name not in hints:
                raise _unknown(cls, f"{path}.{name}", inner)
            _check_keys(cls, hints[name], item, f"{path}.{name}")
    elif isinstance(value, Mapping) and len(get_args(hint)) == 2:
        for name, item in value.items():
            _check_keys(cls, get_args(hint)[1], item, f"{path}.{name}")
    elif isinstance(value, list) and get_args(hint):
        for index, item in enumerate(value):
            _check_keys(cls, get_args(hint)[0], item, f"{path}[{index}]")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass a hint speaks of, as itself or optional."""
    kinds = [item for item in (hint, *get_args(hint)) if isinstance(item, type)]
    if get_origin(hint) in (list, dict):
        return None
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def _shown(hint: Any) -> str:
    """A type in words."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(hint.__members__)
    if dataclasses.is_dataclass(hint):
        return "a section (key: value lines)"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("null" if item is NoneType else _shown(item) for item in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _unknown(cls: type, path: str, kind: Any) -> _Problem:
    """An unknown key, with the nearest known: its siblings first, then any in the tree."""
    head, _, name = path.rpartition(".")
    siblings = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    if close := difflib.get_close_matches(name, siblings, 1, 0.6):
        nearest = f"{head}.{close[0]}" if head else close[0]
    else:
        known = list(_known(cls, ""))
        same = [other for other in known if other.rpartition(".")[2] == name]
        beside = [f"{head}.{field}" if head else field for field in siblings]
        nearest = (same or difflib.get_close_matches(path, beside or known, 1, 0.0))[0]
    return _Problem(f"unknown key {path}; did you mean {nearest}?")


def _known(cls: type, prefix: str) -> Iterator[str]:
    """Every dotted key of a dataclass and the dataclasses inside it."""
    for name, hint in get_type_hints(cls).items():
        yield f"{prefix}{name}"
        if inner := _dataclass_in(hint):
            yield from _known(inner, f"{prefix}{name}.")
