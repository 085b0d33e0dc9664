"""Image files as RGB, whatever their format, mode or metadata."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import EpsImagePlugin, ExifTags, Image, ImageFile, UnidentifiedImageError, features

from gist.data.metadata import without_metadata

MOST_ASPECT = 200
"""The longer side over the shorter at most. Resized by its shorter side, a line of 60,000 pixels
would take gigabytes."""
BACKGROUND = "white"  # where an image is transparent
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's own plugins for libraries that a build may lack, by format.
_LIBRARIES = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}


def image_suffixes() -> frozenset[str]:
    """The suffixes of the formats that the installed Pillow decodes, in lower case.

    HEIC joins them where the package pillow-heif is installed, and a format that another plugin
    has registered. Formats that Pillow only recognises (HDF5, MPEG, WMF outside Windows, EPS
    without Ghostscript) are not among them.
    """
    _init_pillow()
    return frozenset(s for s, kind in Image.registered_extensions().items() if _decodes(kind))


@cache
def _init_pillow() -> None:
    Image.init()
    if "HEIF" not in Image.OPEN and find_spec("pillow_heif") is not None:
        import_module("pillow_heif").register_heif_opener()


def _decodes(kind: str) -> bool:
    if kind == "MPO":  # opened as JPEG
        kind = "JPEG"
    if kind not in Image.OPEN or kind == "MPEG":
        return False
    if kind == "EPS":
        return bool(EpsImagePlugin.has_ghostscript())
    library = _LIBRARIES.get(kind)
    if library in features.modules and not features.check(library):
        return False
    factory: Any = Image.OPEN[kind][0]
    if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile):
        return getattr(sys.modules[factory.__module__], "_handler", None) is not None
    return True


def read_image(path: Path, least_side: int | None = None) -> Image.Image:
    """An image file as RGB; see :func:`decode`. The file is read once."""
    return decode(path.read_bytes(), least_side)


def decode(data: bytes, least_side: int | None = None) -> Image.Image:
    """An image file's content as RGB, turned upright as its EXIF orientation says.

    The first frame of an animation is taken. Transparent parts show white. 16-bit grey levels are
    scaled to 8 bits. Damaged metadata are ignored; an orientation that can't be read, too.

    Args:
        data: the file's content.
        least_side: of a JPEG, libjpeg may decode a half, a quarter or an eighth of the pixels a
            side, if the shorter side then still has this many. It computes fewer inverse cosine
            transforms. Other formats are decoded in full.

    Returns:
        The image; its ``format`` is the file's.

    Raises:
        UnidentifiedImageError: no format that Pillow decodes.
        ValueError: levels without a fixed range: 32-bit integers, or floating point; or a side of
            more than :data:`MOST_ASPECT` times the other.
        Exception: whatever Pillow raises for damaged pixels.
    """
    _init_pillow()
    if not data:
        raise UnidentifiedImageError("the file is empty")
    try:
        return _decode(data, least_side)
    except Image.DecompressionBombError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        bare = without_metadata(data)
        if bare is not None:
            try:
                return _decode(bare, least_side)
            except Exception:  # the pixels are damaged too
                pass
        if isinstance(error, UnidentifiedImageError):  # Pillow's text names the buffer
            raise UnidentifiedImageError("cannot identify image file") from error
        raise


def _decode(data: bytes, least_side: int | None) -> Image.Image:
    with Image.open(BytesIO(data)) as image:
        if max(image.size) > MOST_ASPECT * min(image.size):
            raise ValueError(
                f"it has {image.width:,} x {image.height:,} pixels; the longer side may be at most "
                f"{MOST_ASPECT} times the shorter"
            )
        if least_side is not None:
            image.draft(None, (least_side, least_side))
        deep = "16B" in str(image.tile[0][3]) if image.format == "PNG" and image.tile else False
        image.load()
        turn = _turn(image)
        key = image.info.get("transparency")
        if deep and image.mode == "RGB" and isinstance(key, tuple):
            # Pillow keeps the upper 8 bits of a channel, but all 16 of the transparent colour.
            image.info["transparency"] = tuple(level >> 8 for level in key)
        upright = to_rgb(image)
        if turn is not None:
            upright = upright.transpose(turn)
        upright.format = image.format
        return upright


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the image upright. None if nothing does, or if its EXIF can't be read."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        return _TURNS.get(orientation)
    except Exception:  # readers of damaged EXIF raise anything
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, on white where it is transparent.

    Raises:
        ValueError: levels without a fixed range.
    """
    # Pillow gives PNM's and, before version 11, PNG's 16-bit levels as 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels = np.asarray(image)
        clear = image.info.get("transparency")
        # PIL would clip, not scale: every level above 255 of 65535 would turn white.
        grey = (levels >> 8).astype(np.uint8)
        if isinstance(clear, int):
            grey = np.where(levels == clear, np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    page = Image.new("RGBA", image.size, BACKGROUND)
    page.alpha_composite(image.convert("RGBA"))
    return page.convert("RGB")
