"""Predictions of a finished run for new images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from gist.data import DataError
from gist.data.base import Transformed
from gist.data.folder import ImageFiles
from gist.data.walk import Found, find_images
from gist.model.saving import CONFIG_FILE
from gist.runs.run import load_run, transforms_of


class Prediction(NamedTuple):
    """The most probable class of an image, by the class token's logits."""

    image: Path
    label: str
    probability: float


def find(images: Sequence[Path]) -> Found:
    """The image files that paths name: files as they are, folders by :func:`find_images`.

    Raises:
        FileNotFoundError: no such file or folder, or no image in any.
    """
    absent = [str(path) for path in images if not path.exists()]
    if absent:
        raise FileNotFoundError(f"no such image or folder: {', '.join(absent)}")
    found = Found()
    for path in images:
        if not path.is_dir():
            found.images.append(path)
            continue
        below = find_images(path)
        found.images += below.images
        found.passed_over += below.passed_over
        found.faults += below.faults
    if not (found.images or found.faults):
        raise FileNotFoundError(f"no image in {', '.join(map(str, images))}")
    return found


def predict(
    directory: Path, images: Sequence[Path] | Found, *, device: str = "cpu", batch_size: int = 32
) -> Iterator[Prediction]:
    """Predict images with a run's model, prepared as the run's own images were.

    Args:
        directory: a finished run's.
        images: files, and folders whose image files are all taken, with those in sub-folders and
            behind links; or what :func:`find` found.
        device: where to compute.
        batch_size: images per forward.

    Yields:
        One prediction per image, in the given order; a folder's images by name.

    Raises:
        FileNotFoundError: no finished run, or no such image: before the first prediction.
        DataError: images that can't be read, each with the reason: after all other predictions.
    """
    model = load_run(directory).to(device)
    classes = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))["classes"]
    found = images if isinstance(images, Found) else find(images)
    files, faults = found.images, found.faults
    inputs = Transformed(ImageFiles([(file, 0) for file in files]), transforms_of(directory))

    def decoded(index: int) -> torch.Tensor | DataError:
        try:
            return inputs[index][0]
        except DataError as error:
            return error

    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        with ThreadPoolExecutor() as pool:
            images_read = list(pool.map(decoded, range(start, start + len(batch))))
        read: list[Path] = []
        pixels: list[torch.Tensor] = []
        for file, image in zip(batch, images_read, strict=True):
            if isinstance(image, DataError):
                faults.append(str(image))
            else:
                read.append(file)
                pixels.append(image)
        if not read:
            continue
        with torch.no_grad():
            probabilities, labels = model(torch.stack(pixels).to(device)).float().softmax(1).max(1)
        for file, label, probability in zip(
            read, labels.tolist(), probabilities.tolist(), strict=True
        ):
            yield Prediction(file, classes[label], probability)
    if faults:
        raise DataError("not predicted:\n  " + "\n  ".join(faults))
