"""Small pictures as data URIs: thumbnails, and attention over the image it was computed for."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

THUMBNAIL_SIDE, MAP_SIDE = 160, 176  # pixels; shown smaller, for screens with two pixels per point
QUALITY = 80
# Of matplotlib's "inferno", from no attention to the most.
_COLOURS = np.array(
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)],
    np.float64,
)


def thumbnail(image: Image.Image, side: int = THUMBNAIL_SIDE) -> str:
    """An RGB image of at most ``side`` pixels a side as a JPEG's data URI.

    A smaller one is enlarged by a whole factor, so that its pixels stay sharp.
    """
    factor = side // max(image.size)
    if factor > 1:
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    elif max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    return data_uri(image)


def data_uri(image: Image.Image) -> str:
    """An RGB image as a JPEG's data URI."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def to_image(pixels: torch.Tensor) -> Image.Image:
    """uint8 (3, H, W) as a picture."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def heat_map(pixels: torch.Tensor, weights: torch.Tensor) -> Image.Image:
    """Weights over an image in grey; the largest weight has the brightest colour.

    Args:
        pixels: uint8 (3, H, W).
        weights: (rows, columns), not negative; one for each patch.
    """
    size = pixels.shape[2], pixels.shape[1]
    share = (weights / weights.max().clamp_min(1e-12)).numpy().astype(np.float32)
    # By nearest neighbour, which shows the patches that there are.
    heat = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.NEAREST))
    grey = np.asarray(to_image(pixels).convert("L"), np.float64)[..., None]
    colour = _colours(heat)
    mixed = 0.35 * grey + 0.65 * colour
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _colours(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(H, W) values in [0, 1] to (H, W, 3) colours."""
    places = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(values, places, channel) for channel in _COLOURS.T], axis=-1)
