"""Image files as they come: formats, modes, transparency, and damaged metadata."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, UnidentifiedImageError

from gist.data.images import decode, image_suffixes, read_image

# Pillow warns of the damage that it can live with.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def saved(kind: str, image: Image.Image | None = None, **options) -> bytes:
    stream = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(bits: int, colour: int, row: bytes, *chunks: bytes, width: int = 2) -> bytes:
    """A PNG of one row, written out by its specification."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return SIGNATURE + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def with_segment(marker: int, data: bytes) -> bytes:
    whole = saved("JPEG")
    return whole[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data + whole[2:]


def with_chunk(*chunks: bytes) -> bytes:
    whole = saved("PNG")
    return whole[:33] + b"".join(chunks) + whole[33:]


def levels(data: bytes) -> list[list[int]]:
    return np.asarray(decode(data))[0].tolist()


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value


UPRIGHT_BY_6 = entry(0x0112, 3, 1, struct.pack("<HH", 6, 0))


def exif(*entries: bytes) -> bytes:
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


@pytest.mark.parametrize(
    "other",
    [
        entry(0x011A, 2, 4, b"abc\0"),  # XResolution as text
        entry(0x0100, 2, 4, b"abc\0"),  # ImageWidth as text
        entry(0x8769, 4, 1, b"\xff\xff\xff\xff"),  # an Exif directory beyond the end
        entry(0x010F, 2, 2**31, b"\xff\xff\xff\xff"),
        entry(0x0111, 99, 1, b"\0\0\0\0"),  # a type that does not exist
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_counts_whatever_else_the_exif_holds(kind, other):
    plain = saved("PNG") if kind == "PNG" else saved(kind, quality=95)
    block = exif(other, UPRIGHT_BY_6) if other[:2] < b"\x12\x01" else exif(UPRIGHT_BY_6, other)
    if kind == "JPEG":
        block = b"Exif\0\0" + block
        damaged = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    elif kind == "PNG":
        damaged = plain[:33] + chunk(b"eXIf", block) + plain[33:]
    else:
        damaged = saved(kind, quality=95, exif=block)
    expected = np.rot90(np.asarray(decode(plain)), -1)
    np.testing.assert_array_equal(np.asarray(decode(damaged)), expected)


def scribbled(kind: str, count: int) -> Iterator[bytes]:
    """Files with whole pixels and an EXIF block in which bytes were overwritten or cut off."""
    draw = random.Random(0)
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x011A] = 1, "maker", 72.0
    tags[0x8769] = {0x9003: "2020:01:01 00:00:00", 0x9000: b"0230"}
    block = tags.tobytes()
    for _ in range(count):
        changed = bytearray(block)
        for _ in range(draw.randint(1, 6)):
            changed[draw.randrange(6, len(block))] = draw.choice((0, 255, draw.randrange(256)))
        cut = bytes(changed[: draw.choice((len(block), draw.randrange(8, len(block))))])
        if kind == "JPEG":
            yield with_segment(0xE1, cut)
        elif kind == "PNG":
            yield with_chunk(chunk(b"eXIf", cut[6:]))
        else:
            yield saved("WEBP", exif=cut)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_damage_to_the_exif_makes_an_image_unusable(kind):
    count = 300 if kind != "WEBP" else 60
    colours = sorted(np.asarray(decode(saved(kind))).reshape(-1, 3).tolist())
    for data in scribbled(kind, count):
        # Damage may spell another orientation, which moves pixels.
        assert sorted(np.asarray(decode(data)).reshape(-1, 3).tolist()) == colours


@pytest.mark.parametrize(
    "data",
    [
        with_segment(0xE0, b"JFIF\0"),
        with_segment(0xE2, b"ICC_PROFILE\0"),
        with_segment(0xEE, b"Adobe"),
        with_segment(0xED, b"Photoshop 3.0\0008BIM"),
        with_segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
        with_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<"),
    ],
)
def test_damaged_jpeg_segments_change_no_pixel(data):
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(decode(saved("JPEG"))))


@pytest.mark.parametrize(
    "damage",
    [
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**21))),  # above Pillow's limit
        chunk(b"iCCP", b"no end"),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 2**21)),
        chunk(b"zTXt", b"k\0\7?"),
        chunk(b"gAMA", b"?"),
        chunk(b"cHRM", b"?"),
        chunk(b"pHYs", b"?"),
        chunk(b"sRGB", b""),
        chunk(b"acTL", b"?"),
        chunk(b"tRNS", b"?"),
        chunk(b"tEXt", b"k\0v", crc=0),
        chunk(b"eXIf", b"no tiff"),
    ],
    ids=lambda damage: damage[4:8].decode(),
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_damaged_png_chunks_change_no_pixel(damage, place):
    whole = saved("PNG")
    at = 33 if place == "before" else len(whole) - 12
    found = decode(whole[:at] + damage + whole[at:])
    np.testing.assert_array_equal(np.asarray(found), PIXELS)


def test_a_png_cut_within_what_follows_its_pixels_is_whole():
    cut = saved("PNG")[:-12] + struct.pack(">I", 9999) + b"tEXtcomment\0"
    np.testing.assert_array_equal(np.asarray(decode(cut)), PIXELS)


@pytest.mark.parametrize("tag", [0x010F, 0x011A, 0x0131])
@pytest.mark.parametrize("value", [b"\xff\xff" * 5, b"\0\0" * 5, b"\x02\0\xff\xff\xff\x7f\0\0\0\0"])
def test_damaged_tiff_tags_change_no_pixel(tag, value):
    tags = Image.Exif()
    tags[0x010F], tags[0x011A], tags[0x0131], tags[0x0112] = "the maker", 72.0, "the software", 6
    data = bytearray(saved("TIFF", exif=tags))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    (place,) = (
        at for at in range(start + 2, start + 2 + 12 * count, 12)
        if struct.unpack_from("<H", data, at) == (tag,)
    )  # fmt: skip
    data[place + 2 : place + 12] = value
    np.testing.assert_array_equal(np.asarray(decode(bytes(data))), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_missing_pixels_are_never_passed_off_as_an_image(kind):
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = saved(kind, large)
    decode(data)
    with pytest.raises(Exception):  # noqa: B017  each decoder has its own
        decode(data[: len(data) // 2])


def test_changed_pixels_of_a_png_are_never_passed_off_as_an_image():
    data = bytearray(with_chunk(chunk(b"gAMA", b"?")))
    data[data.find(b"IDAT") + 20] ^= 1
    with pytest.raises(Exception):  # noqa: B017
        decode(bytes(data))


def test_what_is_no_image_is_said_without_an_address():
    for data, reason in ((b"", "the file is empty"), (b"<html>", "cannot identify image file")):
        with pytest.raises(UnidentifiedImageError, match=f"^{reason}$"):
            decode(data)


# ---- transparency: black, which is invisible, opaque and one fifth opaque, on white

BLACK = [[255] * 3, [0] * 3, [204] * 3]
ALPHA = np.array([[0, 255, 51]], np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(kind, mode):
    image = Image.new("L", (3, 1)).convert(mode)
    image.putalpha(Image.fromarray(ALPHA))
    assert levels(saved(kind, image, **({"lossless": True} if kind == "WEBP" else {}))) == BLACK


def test_a_palettes_transparency_shows_white():
    palette = chunk(b"PLTE", bytes(9))
    alpha = chunk(b"tRNS", ALPHA.tobytes())
    assert levels(png(8, 3, b"\0\1\2", palette, alpha, width=3)) == BLACK


@pytest.mark.parametrize(
    ("data", "second"),
    [
        (png(8, 0, b"\x07\x40", chunk(b"tRNS", b"\0\x07")), 0x40),
        (png(1, 0, b"\x40", chunk(b"tRNS", b"\0\0")), 255),
        (png(16, 0, b"\x03\xe8\x40\0", chunk(b"tRNS", b"\x03\xe8")), 0x40),
        (png(8, 2, b"\1\2\3\x40\x40\x40", chunk(b"tRNS", b"\0\1\0\2\0\3")), 0x40),
        (
            png(
                16, 2, b"\1\xff\2\xff\3\xff" + b"\x40\0" * 3, chunk(b"tRNS", b"\1\xff\2\xff\3\xff")
            ),
            0x40,
        ),
        (png(16, 6, bytes(8) + b"\x40\0\x40\0\x40\0\xff\xff"), 0x40),
        (png(16, 4, bytes(4) + b"\x40\0\xff\xff"), 0x40),
    ],
    ids=["grey8", "grey1", "grey16", "rgb8", "rgb16", "rgba16", "la16"],
)
def test_transparent_colours_of_any_depth_show_white(data, second):
    assert levels(data) == [[255] * 3, [second] * 3]


def test_an_animations_first_frame_is_taken_on_white():
    frames = [Image.new("RGBA", (2, 1), colour) for colour in ("red", "blue")]
    frames[0].putpixel((0, 0), (0, 0, 0, 0))
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(kind, frames[0], save_all=True, append_images=frames[1:], **options)
        assert levels(data) == [[255, 255, 255], [255, 0, 0]], kind


def test_16_bit_pgm_is_scaled():
    assert levels(b"P5 2 1 65535\n\x40\0\xff\xff") == [[0x40] * 3, [255] * 3]


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.allclose(levels(saved("JPEG", image, quality=95))[0], [255, 0, 0], atol=4)


# ---- suffixes


def test_every_suffix_of_a_format_that_pillow_decodes_is_an_images():
    suffixes = image_suffixes()
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".tif", ".tiff",
            ".webp", ".ppm", ".pgm", ".tga", ".mpo", ".ico", ".qoi"} <= suffixes  # fmt: skip
    assert not suffixes & {".pdf", ".h5", ".hdf", ".grib", ".bufr", ".mpg", ".mpeg", ".txt", ""}


def test_a_plugins_format_counts_as_soon_as_pillow_knows_it(monkeypatch, tmp_path):
    class Reader(ImageFile.ImageFile):
        format = "TESTING"

        def _open(self):
            self._mode, self._size = "RGB", (1, 1)
            self.tile = [("raw", (0, 0, 1, 1), 4, ("RGB", 0, 1))]

    assert ".testing" not in image_suffixes()
    for name in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, name, dict(getattr(Image, name)))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    Image.register_open("TESTING", Reader, lambda prefix: prefix.startswith(b"TEST"))
    Image.register_extension("TESTING", ".testing")
    assert ".testing" in image_suffixes()
    path: Path = tmp_path / "x.testing"
    path.write_bytes(b"TEST\1\2\3")
    image = read_image(path)
    assert (image.getpixel((0, 0)), image.format) == ((1, 2, 3), "TESTING")


@pytest.mark.parametrize(("feature", "suffix"), [("avif", ".avif"), ("webp", ".webp")])
def test_a_format_whose_library_this_pillow_lacks_is_no_images(feature, suffix, monkeypatch):
    plain = image_suffixes()
    monkeypatch.setattr("gist.data.images.features.check", lambda name: name != feature)
    assert suffix not in image_suffixes()
    assert image_suffixes() < plain
