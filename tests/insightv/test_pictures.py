"""Pictures that cannot be read: each refused with one line that says why."""

import io
import random
import struct
import zlib

import pytest
from families import picture
from PIL import Image

from hpc.errors import RecordError
from insightv.pictures import PIXELS, Pictures, PictureWriter, decode


def encoded(kind: str, width: int = 200, height: int = 160) -> bytes:
    file = io.BytesIO()
    picture(0, width, height).save(file, kind)
    return file.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(RecordError) as error:
        decode(data, "x.png")
    assert "\n" not in str(error.value) and "picture x.png cannot be decoded: " in str(error.value)
    return str(error.value)


def test_what_is_no_picture_is_told_apart():
    assert refusal(b"").endswith(": empty")
    assert "none of PNG, JPEG" in refusal(b"a,b\n1,2\n")
    assert "truncated" in refusal(encoded("PNG")[:5000])
    assert "none of PNG, JPEG" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_a_small_file_that_would_fill_the_memory_is_refused(recwarn):
    side = int(PIXELS**0.5) + 1
    head = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I4s", len(head), b"IHDR") + head
    data = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(chunk[4:]))
    data += struct.pack(">I4s", 0, b"IDAT") + struct.pack(">I", zlib.crc32(b"IDAT"))
    assert f"{side} x {side} pixels" in refusal(data)
    huge = data.replace(head, struct.pack(">2I5B", 2**30, 2**30, 8, 2, 0, 0, 0))
    refusal(huge)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_any_damage_gives_a_picture_or_a_reason(kind):
    rng, whole = random.Random(kind), encoded(kind)
    assert decode(whole, "whole").mode == "RGB"
    refused = 0
    for _ in range(60):
        data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randint(1, 4) if data else 0):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            decode(bytes(data), "x.png")
        except RecordError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused


def test_a_broken_chunk_inside_a_picture():
    """Pillow raises SyntaxError for it, and only once pixels are read."""
    data = bytearray(encoded("PNG"))
    end = data.index(b"IEND")
    size = struct.unpack(">I", data[33:37])[0]
    half = bytes(data[41 : 41 + size // 2])
    first = struct.pack(">I4s", len(half), b"IDAT") + half
    first += struct.pack(">I", zlib.crc32(first[4:]))
    broken = bytes(data[:33]) + first + struct.pack(">I", 40) + b"\n\xea\xcbi" + data[end - 4 :]
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(broken)).load()
    refusal(broken)


def test_a_damaged_pack_is_named(tmp_path):
    with PictureWriter(tmp_path / "pack") as writer:
        name = writer.add(encoded("PNG"))
    pack = tmp_path / "pack" / "00000.zip"
    data = bytearray(pack.read_bytes())
    data[300] ^= 1
    pack.write_bytes(data)
    with pytest.raises(RecordError, match=f"picture {name[:12]} is damaged"):
        Pictures([tmp_path / "pack"]).image(name)
