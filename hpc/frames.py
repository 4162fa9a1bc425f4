"""The bytes of a shard: zstd frames of JSON lines, each followed by its done-mark.

A *data frame* holds all rows of some keys, with content size and checksum. The
*skippable frame* after it, which every zstd reader passes over, is the done-mark: JSON
with the keys, their number of rows and the reasons of those that failed::

    {"done": [[key, rows], …], "errors": [[key, reason], …], "data": crc, "mark": crc}

``data`` is the CRC-32 of the data frame's bytes, ``mark`` that of the JSON before it. So
each pair of frames proves itself, without the sidecar.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import zstandard

from hpc.errors import UserError

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MARK_MAGIC = struct.pack("<I", 0x184D2A57)
"""One of the sixteen magic numbers of skippable frames (RFC 8878, 3.1.2)."""

# Level 3 packs text of this kind about 3 times; higher levels gain little and cost much.
_LEVEL = 3
_CHUNK = 1 << 18
_CRC_SUFFIX = len(',"mark":"00000000"}')


class ShardError(UserError):
    """A shard that cannot be trusted; the message names the file and the byte."""

    def __init__(self, path: Path, offset: int, what: str) -> None:
        """A damage of ``path`` at byte ``offset``."""
        super().__init__(
            f"{path}: {what} (byte {offset}); "
            "`shards repair` keeps what is whole, then run its stage again"
        )
        self.path, self.offset, self.what = path, offset, what


class Hasher(Protocol):
    """What `hashlib.sha256()` returns."""

    def update(self, data: bytes, /) -> None:
        """Takes more bytes in."""
        ...

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        ...


@dataclass(frozen=True)
class Entry:
    """One key's outcome.

    Attributes:
        key: The input's key.
        rows: Its output rows, each one line of JSON without the line end.
        error: Why it failed; empty when it did not.
    """

    key: str
    rows: list[bytes]
    error: str = ""


@dataclass(frozen=True)
class Frame:
    """A data frame with its done-mark, at ``start`` to ``end`` of the file."""

    start: int
    end: int
    entries: list[Entry]


def encode_row(row: dict[str, Any]) -> bytes:
    """A row as one line of UTF-8 JSON.

    Halves of surrogate pairs, which a model may write as an escape, are no characters
    and are stored as U+FFFD.

    Raises:
        ValueError: The row holds NaN or an infinity, which JSON lacks.
        TypeError: The row holds something that has no JSON form.
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def add_up(sums: dict[str, int], entry: Entry) -> None:
    """Adds the whole numbers under some fields of an entry's rows to their sums."""
    for row in entry.rows if sums else ():
        held = json.loads(row)
        for name in sums:
            if isinstance(value := held.get(name), int):
                sums[name] += value


def encode_frame(entries: Sequence[Entry]) -> bytes:
    """A data frame and its done-mark."""
    text = b"".join(row + b"\n" for entry in entries for row in entry.rows)
    compressor = zstandard.ZstdCompressor(_LEVEL, write_checksum=True, write_content_size=True)
    data = compressor.compress(text)
    body = json.dumps(
        {
            "done": [[entry.key, len(entry.rows)] for entry in entries],
            "errors": [[entry.key, entry.error] for entry in entries if entry.error],
            "data": f"{zlib.crc32(data):08x}",
        },
        separators=(",", ":"),
    ).encode()
    mark = body[:-1] + f',"mark":"{zlib.crc32(body):08x}"}}'.encode()
    return data + MARK_MAGIC + struct.pack("<I", len(mark)) + mark


def read_frames(file: BinaryIO, path: Path, hasher: Hasher | None = None) -> Iterator[Frame]:
    """Reads frames from where ``file`` stands to its end, one in memory at a time.

    Args:
        file: The open shard.
        path: Its name, for errors.
        hasher: Is fed every byte read.

    Raises:
        ShardError: The first frame that is cut, damaged or without its mark.
    """
    source = _Source(file, path, hasher)
    while source.peek():
        start = source.offset
        text, crc = _read_data(source)
        mark = _read_mark(source)
        yield Frame(start, source.offset, _entries(path, start, text, crc, mark))


def whole_frames(path: Path) -> Iterator[tuple[Frame, bytes]]:
    """The whole frames of a file that may be cut or damaged, with their bytes.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        start: int | None = 0
        while start is not None:
            file.seek(start)
            try:
                for frame in read_frames(file, path):
                    start = frame.end
                    yield frame, os.pread(file.fileno(), frame.end - frame.start, frame.start)
                return
            except ShardError:
                start = next(_positions(file, ZSTD_MAGIC, start + 1), None)


def marked_keys(path: Path) -> set[str]:
    """The keys of every whole done-mark of a damaged file, also of those whose rows are gone."""
    keys = set[str]()
    with path.open("rb", buffering=0) as file:
        for start in _positions(file, MARK_MAGIC, 0):
            descriptor = file.fileno()
            size = int.from_bytes(os.pread(descriptor, 4, start + 4), "little")
            # A chance match of the magic number must not ask for gigabytes.
            size = min(size, os.fstat(descriptor).st_size - start)
            try:
                mark = decode_mark(os.pread(descriptor, size, start + 8))
            except ValueError:
                continue
            keys.update(key for key, _ in mark["done"])
    return keys


def decode_mark(payload: bytes) -> dict[str, Any]:
    """Checks and parses a done-mark.

    Raises:
        ValueError: It is damaged.
    """
    body = payload[:-_CRC_SUFFIX] + b"}"
    if payload[-_CRC_SUFFIX:] != f',"mark":"{zlib.crc32(body):08x}"}}'.encode():
        raise ValueError("checksum of the done-mark")
    mark: dict[str, Any] = json.loads(body)
    return mark


def _positions(file: BinaryIO, needle: bytes, start: int) -> Iterator[int]:
    """Where ``needle`` stands in a file, from byte ``start`` on."""
    overlap = len(needle) - 1
    while chunk := os.pread(file.fileno(), _CHUNK, start):
        at = chunk.find(needle)
        while at >= 0:
            yield start + at
            at = chunk.find(needle, at + 1)
        if len(chunk) <= overlap:
            return
        start += len(chunk) - overlap


class _Source:
    """A file read in chunks, of which what was too much can be given back."""

    def __init__(self, file: BinaryIO, path: Path, hasher: Hasher | None) -> None:
        self.path = path
        self.offset = file.tell()
        self._file, self._hasher, self._buffer = file, hasher, b""

    def peek(self) -> bytes:
        """What comes next, without taking it; empty at the end."""
        if not self._buffer:
            self._buffer = self._file.read(_CHUNK)
            if self._hasher is not None:
                self._hasher.update(self._buffer)
        return self._buffer

    def skip(self, count: int) -> None:
        """Takes the first ``count`` bytes of what `peek` returned."""
        self._buffer = self._buffer[count:]
        self.offset += count

    def take(self, count: int) -> bytes:
        """Exactly ``count`` bytes."""
        start, parts, missing = self.offset, [], count
        while missing:
            part = self.peek()[:missing]
            if not part:
                raise ShardError(self.path, start, "cut off inside a frame")
            parts.append(part)
            missing -= len(part)
            self.skip(len(part))
        return b"".join(parts)


def _read_data(source: _Source) -> tuple[bytes, int]:
    """One data frame's text and the CRC-32 of its bytes."""
    start, texts, crc = source.offset, [], 0
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    while not decompressor.eof:
        chunk = source.peek()
        if not chunk:
            raise ShardError(source.path, start, "cut off inside a frame")
        try:
            texts.append(decompressor.decompress(chunk))
        except (zstandard.ZstdError, MemoryError):
            raise ShardError(source.path, start, "a damaged frame") from None
        used = len(chunk) - len(decompressor.unused_data)
        crc = zlib.crc32(chunk[:used], crc)
        source.skip(used)
    return b"".join(texts), crc


def _read_mark(source: _Source) -> dict[str, Any]:
    start = source.offset
    if source.peek() and source.take(4) != MARK_MAGIC:
        raise ShardError(source.path, start, "a frame without its done-mark")
    size = struct.unpack("<I", source.take(4))[0]
    try:
        return decode_mark(source.take(size))
    except ValueError:
        raise ShardError(source.path, start, "a damaged done-mark") from None


def _entries(path: Path, start: int, text: bytes, crc: int, mark: dict[str, Any]) -> list[Entry]:
    """Deals a frame's lines out to its keys."""
    lines = text.split(b"\n")
    if mark["data"] != f"{crc:08x}" or len(lines) - 1 != sum(rows for _, rows in mark["done"]):
        raise ShardError(path, start, "a frame that is not the one of its done-mark")
    errors = dict(mark["errors"])
    entries, at = [], 0
    for key, rows in mark["done"]:
        entries.append(Entry(key, lines[at : at + rows], errors.get(key, "")))
        at += rows
    return entries
