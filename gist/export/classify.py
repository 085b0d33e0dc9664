"""Classify images with the model in this file's folder, and print CSV as ``gist predict`` does.

    python classify.py photo.jpg more-photos/*.png

Needs numpy and Pillow, and onnxruntime for model.onnx, torch for model.pt2, or timm for
model.safetensors. ``gist export`` copies this file beside each model; it needs no gist.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FOLDER = Path(__file__).parent
BATCH_SIZE = 32
Array = np.ndarray[Any, Any]


def load_model(folder: Path = FOLDER) -> Callable[[Array], Array]:
    """The function from float32 images (N, 3, size, size) to float32 logits (N, classes)."""
    if (folder / "model.onnx").is_file():
        import onnxruntime

        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        return lambda images: session.run(["logits"], {"images": images})[0]

    import torch

    model: Any
    if (folder / "model.pt2").is_file():
        model = torch.export.load(folder / "model.pt2").module()
    else:
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def logits(images: Array) -> Array:
        with torch.no_grad():
            found: Array = model(torch.from_numpy(images)).numpy()
        return found

    return logits


def load_settings(folder: Path = FOLDER) -> dict[str, Any]:
    """preprocessing.json: how an image becomes the model's input, and the names of the classes."""
    settings: dict[str, Any] = json.loads((folder / "preprocessing.json").read_bytes())
    return settings


def read_image(path: str | Path, jpeg_least_side: int | None = None) -> Image.Image:
    """An image as RGB: upright, and white where it is transparent.

    Args:
        path: the file.
        jpeg_least_side: a JPEG may be decoded at a half, a quarter or an eighth of its size, if its
            shorter side then still has this many pixels.

    Raises:
        ValueError: a file that can't be read, or with more than 8 bits a channel; it is named.
    """
    try:
        return _decoded(path, jpeg_least_side)
    except Exception as error:  # decoders of damaged files raise anything
        raise ValueError(f"{path} can't be read: {error}") from error


def _decoded(path: str | Path, jpeg_least_side: int | None) -> Image.Image:
    image: Image.Image = Image.open(path)
    if jpeg_least_side is not None:
        image.draft(None, (jpeg_least_side, jpeg_least_side))
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel; convert it to 8")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image.convert("RGB")


def to_input(image: Image.Image, settings: Mapping[str, Any]) -> Array:
    """An RGB image as float32 (3, size, size): resized, its centre cropped, normalised."""
    side, size = settings["resize_to"], settings["size"]
    width, height = image.size
    if not settings["keep_aspect"]:
        width = height = side
    elif width <= height:
        width, height = side, int(side * height / width)
    else:
        width, height = int(side * width / height), side
    resampling = Image.Resampling[settings["interpolation"].upper()]
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), resampling)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    mean, std = (np.asarray(settings[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def classify(paths: Sequence[str | Path], folder: Path = FOLDER) -> list[tuple[str, float]]:
    """The most probable class of each image, and its probability.

    Raises:
        ValueError: as :func:`read_image`.
    """
    settings, model = load_settings(folder), load_model(folder)
    found = []
    for start in range(0, len(paths), BATCH_SIZE):
        images = [
            to_input(read_image(path, settings["jpeg_least_side"]), settings)
            for path in paths[start : start + BATCH_SIZE]
        ]
        logits = model(np.stack(images))
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        for row in probabilities:
            found.append((settings["classes"][row.argmax()], float(row.max())))
    return found


def main(paths: Sequence[str]) -> None:
    """Print the CSV; a message instead where an image can't be read, or none is given."""
    if not paths:
        sys.exit(__doc__)
    try:
        found = classify(paths)
    except ValueError as error:
        sys.exit(f"error: {error}")
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["image", "class", "probability"])
    for path, (label, probability) in zip(paths, found, strict=True):
        table.writerow([path, label, f"{probability:.4f}"])


if __name__ == "__main__":
    main(sys.argv[1:])
