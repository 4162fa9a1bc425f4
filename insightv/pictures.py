"""Pictures, stored once under the SHA-256 of their file, in uncompressed zip packs.

A pack is an ordinary zip (``unzip -l`` lists it), so millions of pictures are some
hundred files. Records refer to pictures by id.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from hpc.errors import RecordError, UserError

PACK_BYTES = 256 * 2**20
"""A new pack is begun beyond this size."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded. The library knows dozens more, some of which start other programs."""
PIXELS = 64_000_000
"""The largest picture that is decoded: 8,000 × 8,000, some 200 MB. A small file may hold more."""

# It warns of large pictures on stderr, which nobody reads; they are refused here by name.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# As of damaged notes about a picture, where only the picture counts.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class PictureWriter:
    """Writes packs ``00000.zip``, ``00001.zip``, … into a folder; a context manager."""

    def __init__(self, directory: Path):
        """Starts afresh in ``directory``, which is created."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*.zip*"):
            old.unlink()
        self._seen: set[str] = set()
        self._packs = 0
        self._zip: zipfile.ZipFile | None = None
        self._size = 0

    def add(self, data: bytes) -> str:
        """Stores an encoded picture (PNG, JPEG, …) and returns its id."""
        picture = hashlib.sha256(data).hexdigest()
        if picture in self._seen:
            return picture
        if self._zip is None or self._size > PACK_BYTES:
            self._close_pack()
            self._zip = zipfile.ZipFile(self._pack().with_suffix(".zip.part"), "w")
            self._size = 0
        # A fixed date: the same pictures give the same bytes.
        self._zip.writestr(zipfile.ZipInfo(picture, (1980, 1, 1, 0, 0, 0)), data)
        self._seen.add(picture)
        self._size += len(data)
        return picture

    def _pack(self) -> Path:
        return self.directory / f"{self._packs:05d}.zip"

    def _close_pack(self) -> None:
        if self._zip is not None:
            self._zip.close()
            self._pack().with_suffix(".zip.part").replace(self._pack())
            self._packs += 1
            self._zip = None

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._close_pack()
        elif self._zip is not None:
            self._zip.close()


class Pictures:
    """Read access to the packs of several folders, by id."""

    def __init__(self, directories: Iterable[Path]):
        """Reads the packs' directories; the pictures themselves stay on disk.

        Raises:
            UserError: A pack is damaged.
        """
        self._packs: dict[str, zipfile.ZipFile] = {}
        for directory in directories:
            for path in sorted(directory.glob("*.zip")):
                try:
                    pack = zipfile.ZipFile(path)
                except (zipfile.BadZipFile, OSError) as error:
                    raise UserError(
                        f"picture pack {path} is damaged ({error}); remake its stage"
                    ) from None
                self._packs.update(dict.fromkeys(pack.namelist(), pack))

    def __contains__(self, picture: str) -> bool:
        return picture in self._packs

    def __iter__(self) -> Iterator[str]:
        return iter(self._packs)

    def bytes(self, picture: str) -> bytes:
        """The stored file.

        Raises:
            RecordError: No such picture, or its bytes are damaged.
        """
        try:
            data = self._packs[picture].read(picture)
        except KeyError:
            raise RecordError(f"picture {picture[:12]} is not in the store") from None
        except (zipfile.BadZipFile, OSError) as error:
            raise RecordError(f"picture {picture[:12]} is damaged: {error}") from None
        if hashlib.sha256(data).hexdigest() != picture:
            raise RecordError(f"picture {picture[:12]} is damaged: digest differs")
        return data

    def image(self, picture: str) -> Image.Image:
        """The decoded picture, RGB.

        Raises:
            RecordError: No such picture, or it cannot be decoded.
        """
        return decode(self.bytes(picture), picture[:12])


def decode(data: bytes, name: str) -> Image.Image:
    """Decodes an encoded picture to RGB, as a person would be shown it.

    That is upright, on white where it is transparent (a diagram's black lines were on black
    else), and of 16 bits of grey the upper 8; of several frames the first.

    Raises:
        RecordError: Not a picture, cut off, or too large to be decoded safely.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height <= PIXELS:
            return _as_shown(image)
        reason = f"{image.width} x {image.height} pixels, at most {PIXELS:,} are taken"
    except Image.DecompressionBombError:
        reason = f"more than {PIXELS:,} pixels"
    except UnidentifiedImageError:
        reason = "empty" if not data else f"none of {', '.join(FORMATS)}"
    except Exception as error:  # decoders raise what they like: SyntaxError, struct.error, …
        reason = " ".join(str(error).split()) or type(error).__name__
    raise RecordError(f"picture {name} cannot be decoded: {reason}")


def _as_shown(image: Image.Image) -> Image.Image:
    if turned(image):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # the library would make white of all but the darkest
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    shown = Image.new("RGB", image.size, "white")
    shown.paste(image, mask=image.getchannel("A"))
    return shown


def turned(image: Image.Image) -> bool:
    """Whether a picture says that it is to be turned or mirrored before it is shown."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # a note about the picture is damaged, not the picture
        return False
