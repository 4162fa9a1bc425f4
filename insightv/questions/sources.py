"""Rows of a question set, one at a time: Parquet, JSON lines, WebDataset, or the hub.

Files that are damaged stop the stage; a row that is damaged is handed on as a `RecordError`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shlex
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.disk import expanded
from hpc.errors import RecordError, UserError, one_line
from hpc.stages import Row
from insightv.folders import add_samples
from insightv.questions.mapping import SetConfig

MOST_BYTES = 256 * 2**20
"""A longer line, or larger file in a tar, is refused: it would have to be held whole."""
BATCH = 16
"""Rows of Parquet held at once; a row may hold several megabytes of pictures."""
BUFFER = 1 << 20
"""Bytes of a Parquet column read at once."""
INSTALL = "pip install -e '.[data]'"


@dataclass(frozen=True)
class Place:
    """Where question sets are found on this machine.

    Attributes:
        folder: What relative paths of sets are relative to.
        network: Whether sets without files may be read from the hub.
    """

    folder: Path = Path()
    network: bool = False

    def of(self, mapping: SetConfig) -> Path:
        """A set's folder."""
        return expanded(self.folder) / expanded(mapping.path)


def rows(mapping: SetConfig, split: str, place: Place) -> Iterator[Row | RecordError]:
    """The rows of a split in order; a row that cannot be read is an error in its place.

    Raises:
        UserError: Files are missing or damaged, a column that is named is nowhere, or a
            package is missing.
    """
    found = files(mapping, split, place)
    if not found:
        return _of_hub(mapping, split)
    reader = {"parquet": _parquet, "jsonl": _lines, "json": _array, "webdataset": _tar}
    return _checked(mapping, found, reader[mapping.format](mapping, found))


def files(mapping: SetConfig, split: str, place: Place) -> list[Path]:
    """The files of a split, sorted by name.

    Raises:
        UserError: There are none, and the set may not be read from the hub either.
    """
    folder = place.of(mapping)
    patterns = mapping.splits[split].files
    try:
        found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    except ValueError as error:  # an empty one, or ** beside other signs
        told = f"splits.{split}.files: {one_line(error)}"
        raise UserError(f"{mapping.name}: {told}; write it as data/train-*.parquet") from None
    if not found and not (place.network and mapping.hub and mapping.splits[split].split):
        wanted = f"{folder}/{patterns[0]}" if patterns else f"files for {split}"
        there = shlex.quote(str(folder))
        fetch = f"`hf download --repo-type dataset {mapping.hub} --local-dir {there}`"
        read = "questions.network=true, or --network, reads it from the hub"
        advice = f"fetch it with {fetch}; {read}" if mapping.hub else ""
        raise UserError(f"{mapping.name}: there is no {wanted}; {advice or 'mend path or files'}")
    return sorted(found)


def count(mapping: SetConfig, split: str, place: Place) -> int | None:
    """How many rows a split has, damaged ones included; None where only reading would tell."""
    found = files(mapping, split, place)
    if not found:
        return None
    with _damage(found):
        if mapping.format == "parquet":
            return sum(_open_parquet(path).metadata.num_rows for path in found)
        if mapping.format == "jsonl":
            return sum(1 for path in found for _ in _raw_lines(path))
        if mapping.format == "json":
            return sum(1 for _ in _array(mapping, found))
        return sum(1 for path in found for _ in _members(path, read=False))


def fingerprint(mapping: SetConfig, split: str, place: Place) -> str:
    """Tells the files of a split apart by their sizes and samples of their bytes.

    Pictures in files of their own are not looked at.
    """
    summed = hashlib.sha256(mapping.revision.encode())
    for path in files(mapping, split, place):
        add_samples(summed, path, 8)
    return summed.hexdigest()[:16]


def field(row: Row, name: str) -> Any:
    """A column's value, ``json.answer`` inside ``json`` included; None where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _checked(
    mapping: SetConfig, found: list[Path], read: Iterable[Row | RecordError]
) -> Iterator[Row | RecordError]:
    """Demands columns: of the first row that of the question, of one row at least the others."""
    unseen, first = set(mapping.columns) - set(mapping.pictures), True
    with _damage(found):
        for row in read:
            if isinstance(row, dict):
                if first:
                    turns = mapping.turns.column
                    asked = [turns] if turns else [mapping.question, mapping.answer]
                    _demand(mapping, asked, row, found[0])
                    first = False
                unseen -= {name for name in unseen if _has(row, name)}
            yield row
    if unseen and not first:
        raise UserError(f"{mapping.name}: no row has a column {min(unseen)}; mend the mapping")


def _demand(mapping: SetConfig, wanted: Iterable[str], row: Row, path: Path) -> None:
    for name in wanted:
        if not _has(row, name):
            near = difflib.get_close_matches(name, row, 1, 0.0)
            told = f"; did you mean {near[0]}? " if near else "; "
            raise UserError(f"{mapping.name}: {path} has no column {name}{told}(of {_some(row)})")


def _named(mapping: SetConfig, names: Iterable[str]) -> list[str]:
    """The columns a table must have: all that are named, and of pictures at least one."""
    there = [name for name in mapping.pictures if _has(dict.fromkeys(names), name)]
    absent = set(mapping.pictures) - set(there) if there or mapping.text_only else set()
    return [name for name in mapping.columns if name not in absent]


def _has(row: Row, name: str) -> bool:
    head = name.split(".", 1)[0]
    return name in row or head in row


def _some(row: Row) -> str:
    names = list(row)
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


@contextmanager
def _damage(found: list[Path]) -> Iterator[None]:
    """Turns what libraries raise about damaged files into one line that names them."""
    try:
        yield
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        named = found[0] if len(found) == 1 else f"a file of {found[0].parent}"
        raise UserError(f"{named} is damaged ({one_line(error)}); fetch it again") from None


# ---- Parquet


def _parquet(mapping: SetConfig, found: list[Path]) -> Iterator[Row | RecordError]:
    for path in found:
        file = _open_parquet(path)
        names = file.schema_arrow.names
        named = _named(mapping, names)
        _demand(mapping, named, dict.fromkeys(names), path)
        wanted = {name if name in names else name.split(".", 1)[0] for name in named}
        columns = [name for name in names if name in wanted]
        for batch in file.iter_batches(batch_size=BATCH, columns=columns):
            yield from batch.to_pylist()


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"question sets in Parquet need pyarrow: {INSTALL}") from None
    try:
        # Read as it is asked for; a page, with pictures a row group, is in memory whole.
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); fetch it again") from None


# ---- JSON


def _lines(_: SetConfig, found: list[Path]) -> Iterator[Row | RecordError]:
    for path in found:
        for number, line in enumerate(_raw_lines(path), 1):
            if isinstance(line, RecordError):
                yield line
            else:
                yield _parsed(line, f"{path.name}, line {number}")


def _raw_lines(path: Path) -> Iterator[bytes | RecordError]:
    """Lines that are not empty; of one that is too long, only that it is."""
    with path.open("rb") as file:
        while line := file.readline(MOST_BYTES):
            if len(line) == MOST_BYTES and not line.endswith(b"\n"):
                while rest := file.readline(MOST_BYTES):
                    if rest.endswith(b"\n"):
                        break
                yield RecordError(f"row: a line of {path.name} is too long")
            elif line.strip():
                yield line


def _parsed(text: bytes, where: str) -> Row | RecordError:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RecordError(f"row: {where} is no JSON ({one_line(error)})")
    if not isinstance(row, dict):
        return RecordError(f"row: {where} is no JSON object")
    return row


def _array(_: SetConfig, found: list[Path]) -> Iterator[Row | RecordError]:
    for path in found:
        try:
            values = json.loads(path.read_bytes())
        except RecursionError:
            raise UserError(f"{path} is nested too deeply; is it a question set?") from None
        if not isinstance(values, list):
            raise UserError(f"{path} holds no array; for one object a line say format: jsonl")
        for number, value in enumerate(values):
            good = isinstance(value, dict)
            yield value if good else RecordError(f"row: item {number} of {path.name} is no object")


# ---- WebDataset


def _tar(_: SetConfig, found: list[Path]) -> Iterator[Row | RecordError]:
    """Samples of tar files: neighbours with one name up to its first dot."""
    for path in found:
        for key, parts in _members(path):
            row: Row = {"__key__": key}
            problem = None
            for name, data in parts.items():
                value = _member(name, data, f"{key}.{name} in {path.name}")
                problem = value if isinstance(value, RecordError) else problem
                row[name] = value
            yield problem or row


def _members(path: Path, read: bool = True) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    parts: dict[str, bytes | None] = {}
    current = ""
    with tarfile.open(path, "r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != current:
                if parts:
                    yield current, parts
                current, parts = key, {}
            file = tar.extractfile(member) if read and member.size <= MOST_BYTES else None
            parts[ending.lower()] = file.read() if file else None
    if parts:
        yield current, parts


def _member(name: str, data: bytes | None, where: str) -> Any:
    """A file of a sample: parsed by its ending, bytes where that says nothing."""
    if data is None:
        return RecordError(f"row: {where} is too large")
    ending = name.rpartition(".")[2]
    if ending == "json":
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            return RecordError(f"row: {where} is no JSON")
    if ending in ("txt", "text", "cls", "cls2", "question", "answer"):
        return data.decode("utf-8", "replace").strip()
    return data


# ---- the hub


def _of_hub(mapping: SetConfig, split: str) -> Iterator[Row | RecordError]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{mapping.name}: reading from the hub needs datasets: {INSTALL}") from None
    source = mapping.splits[split].split
    if not mapping.revision:
        raise UserError(
            f"{mapping.name}: give revision, the commit of {mapping.hub} to read, so that a run "
            "can be made again"
        )
    try:
        stream = datasets.load_dataset(
            mapping.hub,
            mapping.subset or None,
            split=source,
            revision=mapping.revision,
            streaming=True,
        )
        for number, row in enumerate(stream.decode(False)):
            if not number:
                _demand(mapping, _named(mapping, row), row, Path(mapping.hub))
            yield row
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its transport does, at any row
        raise UserError(
            f"{mapping.name}: the hub does not give {mapping.hub}, split {source} "
            f"({type(error).__name__}: {one_line(error)}); mend the mapping, or fetch the files"
        ) from None
