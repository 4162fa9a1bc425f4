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


def claiming(side: int) -> bytes:
    """A small file that says it is as large as that."""
    head = b"IHDR" + struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head) - 4) + head
    data += struct.pack(">I", zlib.crc32(head))
    return data + struct.pack(">I4s", 0, b"IDAT") + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_a_small_file_that_would_fill_the_memory_is_refused(recwarn):
    side = int(PIXELS**0.5) + 1
    assert f"{side} x {side} pixels" in refusal(claiming(side))
    for side in (20_000, 2**30):
        assert f"more than {PIXELS:,} pixels" in refusal(claiming(side))
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


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_black_lines_on_nothing_are_seen_on_white(mode):
    """As diagrams are drawn; most libraries put them on black."""
    clear = Image.new("LA", (9, 9), (0, 0))
    clear.paste((0, 255), (3, 3, 6, 6))
    options = {"transparency": 0} if mode in "PL" else {}
    if options:
        clear = Image.new(mode, (9, 9), 0)
        clear.paste(1, (3, 3, 6, 6))
    if mode == "P":
        clear.putpalette([0, 0, 0, 0, 0, 0])
    data = saved(clear if options else clear.convert(mode), **options)
    shown = decode(data, "x")
    assert shown.mode == "RGB" and shown.getpixel((0, 0)) == (255, 255, 255)
    assert max(shown.getpixel((4, 4))) <= 1


def test_sixteen_bits_of_grey_keep_their_shades():
    ramp = Image.new("I;16", (256, 8))
    ramp.putdata([256 * n for n in range(256)] * 8)
    shown = decode(saved(ramp), "x")
    assert [shown.getpixel((n, 3)) for n in (0, 100, 255)] == [(n,) * 3 for n in (0, 100, 255)]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_photograph_is_upright_and_a_damaged_note_about_it_does_no_harm():
    image = Image.new("RGB", (100, 50), "red")
    image.paste("blue", (0, 0, 50, 50))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: left is up
    shown = decode(saved(image, "JPEG", exif=turned), "x")
    assert shown.size == (50, 100)
    assert shown.getpixel((25, 20))[2] > 200 and shown.getpixel((25, 80))[0] > 200
    cut = b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12\0\x03"
    assert decode(saved(image, "JPEG", exif=cut), "x").size == (100, 50)
