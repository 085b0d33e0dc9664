"""Data sets, and how their images become a model's input.

Preprocessing is VTAB's: each image is resized straight to a square, bicubic and antialiased,
without crop or augmentation, then normalised as the backbone expects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

# Up to this size a split is decoded and resized once and kept as bytes.
PRELOAD_BYTES = 512 * 2**20


class Images(Protocol):
    """A map-style data set of RGB PIL images and int labels; labels need no decoding."""

    @property
    def labels(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


class DataError(ValueError):
    """Images or labels that can't be trained on; the text lists every fault, one per line."""


@dataclass(frozen=True)
class ImageData:
    """Images in splits that share their classes.

    Attributes:
        name: short, for titles and folders.
        classes: their names; a label is an index into them.
        train, val, test: items are an RGB PIL image and an int label; val and test may be missing.
        fingerprint: changes with any image, label or split.
        every_class_trained: False allows classes without a training image.
        passed_over: files and folders that were found but not used.

    Raises:
        DataError: a label that no class has, or a class without a training image.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images | None
    test: Images | None
    fingerprint: str
    every_class_trained: bool = True
    passed_over: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        faults = []
        for name, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            labels = set(split.labels) if split is not None else set()
            strange = sorted(labels - set(range(len(self.classes))))
            if strange:
                faults.append(
                    f"{name} has the label {strange[0]}; the {len(self.classes)} classes are 0 to "
                    f"{len(self.classes) - 1}"
                )
            if split is not None and not labels:
                faults.append(f"{name} has no image")
        untrained = set(range(len(self.classes))) - set(self.train.labels)
        if not self.every_class_trained:
            untrained = set()
        faults += [f"train has no image of class {self.classes[i]!r}" for i in sorted(untrained)]
        if faults:
            raise DataError(f"{self.name} can't be trained on:\n  " + "\n  ".join(faults))


def fingerprint(parts: Iterable[bytes]) -> str:
    """16 hex digits of a SHA-256 over ``parts`` and their boundaries."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def prepare(
    split: Images, img_size: int, data_config: Mapping[str, Any]
) -> Transformed | Preloaded:
    """The split as normalised float (3, img_size, img_size) images and int labels.

    Decoded once and held in memory where it fits (:data:`PRELOAD_BYTES`), else decoded when asked.

    Args:
        split: of an :class:`ImageData`.
        img_size: side in pixels.
        data_config: ``mean`` and ``std``, as timm's ``resolve_model_data_config`` returns them.
    """
    transformed = Transformed(split, img_size, data_config)
    fits = len(transformed) * 3 * img_size**2 <= PRELOAD_BYTES
    return Preloaded(transformed) if fits else transformed


class Transformed(Dataset[tuple[torch.Tensor, int]]):
    """A split decoded, resized and normalised item by item."""

    def __init__(self, split: Images, img_size: int, data_config: Mapping[str, Any]) -> None:
        self.split, self.img_size = split, img_size
        self.mean = torch.tensor(data_config["mean"])[:, None, None]
        self.std = torch.tensor(data_config["std"])[:, None, None]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels, label = self.pixels(index)
        return self.normalise(pixels), label

    def pixels(self, index: int) -> tuple[torch.Tensor, int]:
        """One image as uint8 (3, img_size, img_size), and its label."""
        image, label = self.split[index]
        # PIL's bicubic filter widens with the scale, as antialias=True does elsewhere.
        image = image.resize((self.img_size, self.img_size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(label)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


class Preloaded(Dataset[tuple[torch.Tensor, int]]):
    """A :class:`Transformed` split decoded once and kept as uint8."""

    def __init__(self, transformed: Transformed) -> None:
        self._normalise = transformed.normalise
        size = transformed.img_size
        self.pixels = torch.empty(len(transformed), 3, size, size, dtype=torch.uint8)
        self.labels: list[int] = []
        for index in range(len(transformed)):
            self.pixels[index], label = transformed.pixels(index)
            self.labels.append(label)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._normalise(self.pixels[index]), self.labels[index]
