"""Pictures out of rows: bytes or files, decoded once, made smaller where they are enormous."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from hpc.errors import RecordError
from insightv.pictures import decode
from insightv.questions.duplicates import Fingerprint

MOST_BYTES = 100 * 2**20
"""A larger file is refused before it is read."""


class PictureSink(Protocol):
    """Takes encoded pictures; a ``PictureWriter`` is one."""

    def add(self, data: bytes) -> str:
        """Stores a picture and returns its id."""
        ...


class Nowhere:
    """A sink that keeps nothing, for whoever wants the questions alone."""

    def add(self, data: bytes) -> str:
        """Forgets a picture."""
        return ""


@dataclass(frozen=True)
class Sides:
    """What a picture may measure, in pixels: see `SetConfig`."""

    shortest: int
    longest: int


@dataclass(frozen=True)
class Ready:
    """A picture that can be stored.

    Attributes:
        data: Encoded: as it came, or made smaller.
        fingerprint: Of its looks.
        shrunk: It was larger than was asked for.
    """

    data: bytes
    fingerprint: Fingerprint
    shrunk: bool = False


def encoded(value: Any, folder: Path | None, depth: int = 4) -> Iterator[bytes]:
    """The encoded pictures of a column's value: one, several, or none.

    Args:
        value: Bytes; a file's name; ``{"bytes": …, "path": …}`` as `datasets` stores
            pictures; a list of these; or None.
        folder: Where named files lie; they never lead out of it.
        depth: How deep lists and dictionaries may be nested.

    Raises:
        RecordError: A file is missing, leads elsewhere or is too large, or a value is none of
            these.
    """
    if value is None:
        return
    if depth < 0:
        raise RecordError("picture: a value in too many lists")
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from encoded(item, folder, depth - 1)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        if len(value) > MOST_BYTES:
            raise RecordError(f"picture: {len(value):,} bytes, at most {MOST_BYTES:,} are taken")
        yield bytes(value)
    elif isinstance(value, dict) and ("bytes" in value or "path" in value):
        inner = value.get("bytes")
        yield from encoded(value.get("path") if inner is None else inner, folder, depth - 1)
    elif isinstance(value, str):
        if value:
            yield _read(value, folder)
    else:
        raise RecordError(f"picture: neither bytes nor a file's name but {type(value).__name__}")


def _read(name: str, folder: Path | None) -> bytes:
    """A file that a row names. Rows are not trusted: none may reach beyond the set's folder.

    Raises:
        RecordError: It is missing, elsewhere, no ordinary file, or too large.
    """
    shown = repr(name[:80])
    if folder is None:
        raise RecordError(f"picture: names the file {shown}, but the set is read from the hub")
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise RecordError(f"picture: the file's name {shown} leads out of the set's folder")
    try:
        path = (folder / relative).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise RecordError(f"picture: the file {shown} leads out of the set's folder")
        if not path.is_file():
            raise RecordError(f"picture: the file {shown} is missing")
        if path.stat().st_size > MOST_BYTES:
            raise RecordError(f"picture: the file {shown} is too large")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise RecordError(f"picture: the file {shown} cannot be read: {said}") from None


def prepare(data: bytes, sides: Sides) -> Ready:
    """Decodes a picture to see that it can be, and makes it smaller where it is enormous.

    Raises:
        RecordError: It cannot be decoded, or is smaller than may be.
    """
    name = hashlib.sha256(data).hexdigest()
    image = decode(data, name[:12])
    if min(image.size) < sides.shortest:
        raise RecordError(f"picture: {image.width} x {image.height} pixels are too few")
    fingerprint = Fingerprint.of(image, name)
    if max(image.size) <= sides.longest:
        return Ready(data, fingerprint)
    image.thumbnail((sides.longest, sides.longest), Image.Resampling.LANCZOS)
    if min(image.size) < sides.shortest:
        raise RecordError("picture: too narrow to be made smaller")
    buffer = io.BytesIO()
    if data[:2] == b"\xff\xd8":  # a photograph stays one; drawings and texts keep their edges
        image.save(buffer, "JPEG", quality=95)
    else:
        image.save(buffer, "PNG")
    return Ready(buffer.getvalue(), fingerprint, shrunk=True)
