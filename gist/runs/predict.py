"""Predictions of a finished run for new images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import resolve_model_data_config

from gist.data import DataError
from gist.data.base import Transformed
from gist.data.folder import ImageFiles, image_files
from gist.model.saving import CONFIG_FILE
from gist.runs.run import load_run


class Prediction(NamedTuple):
    """The most probable class of an image, by the class token's logits."""

    image: Path
    label: str
    probability: float


def predict(
    directory: Path, images: Sequence[Path], *, device: str = "cpu", batch_size: int = 32
) -> Iterator[Prediction]:
    """Predict images with a run's model, prepared as the run's own images were.

    Args:
        directory: a finished run's.
        images: files, and folders whose image files are all taken, with those in sub-folders.
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
    absent = [str(path) for path in images if not path.exists()]
    if absent:
        raise FileNotFoundError(f"no such image or folder: {', '.join(absent)}")
    files = [file for path in images for file in (image_files(path) if path.is_dir() else [path])]
    if not files:
        raise FileNotFoundError(f"no image in {', '.join(map(str, images))}")
    img_size = model.backbone.patch_embed.img_size[0]
    normalisation = resolve_model_data_config(model.backbone)
    inputs = Transformed(ImageFiles([(file, 0) for file in files]), img_size, normalisation)
    faults: list[str] = []
    for start in range(0, len(files), batch_size):
        read: list[Path] = []
        pixels: list[torch.Tensor] = []
        for index, file in enumerate(files[start : start + batch_size], start):
            try:
                pixels.append(inputs[index][0])
            except Exception as error:  # decoders of damaged files raise anything
                faults.append(f"{file} can't be read: {error}")
            else:
                read.append(file)
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
