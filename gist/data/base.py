"""Data sets of labelled items; images among them, and images as a model's input."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from PIL import Image
from torch.utils.data import Dataset

from gist.data.transforms import Transforms, seeded

# Up to this size a split is decoded and resized once and kept as bytes.
PRELOAD_BYTES = 512 * 2**20


class Labelled(Protocol):
    """A map-style data set of items and their int labels; labels need no decoding."""

    @property
    def labels(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class Images(Labelled, Protocol):
    """A map-style data set of RGB PIL images and int labels."""

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


@runtime_checkable
class ReducibleImages(Images, Protocol):
    """Images that can be decoded at a smaller size than they were saved with."""

    def reduced(self, least_side: int) -> Images:
        """The same images; the shorter side of a reduced one has at least ``least_side`` pixels."""
        ...


class DataError(ValueError):
    """Items or labels that can't be trained on; the text lists every fault, one per line."""


@dataclass(frozen=True)
class LabelledData:
    """Items of one kind in splits that share their classes.

    Attributes:
        name: short, for titles and folders.
        classes: their names; a label is an index into them.
        train, val, test: items and int labels; val and test may be missing.
        fingerprint: changes with any item, label or split.
        every_class_trained: False allows classes without a training item.
        passed_over: files and folders that were found but not used.

    Raises:
        DataError: a label that no class has, or a class without a training item.
    """

    item: ClassVar[str] = "item"
    """What an item is, in messages."""
    name: str
    classes: tuple[str, ...]
    train: Labelled
    val: Labelled | None
    test: Labelled | None
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
                faults.append(f"{name} has no {self.item}")
        untrained = set(range(len(self.classes))) - set(self.train.labels)
        if not self.every_class_trained:
            untrained = set()
        faults += [
            f"train has no {self.item} of class {self.classes[i]!r}" for i in sorted(untrained)
        ]
        if faults:
            raise DataError(f"{self.name} can't be trained on:\n  " + "\n  ".join(faults))


@dataclass(frozen=True)
class ImageData(LabelledData):
    """Images in splits that share their classes: items are an RGB PIL image and an int label."""

    item: ClassVar[str] = "image"
    train: Images
    val: Images | None
    test: Images | None


def fingerprint(parts: Iterable[bytes]) -> str:
    """16 hex digits of a SHA-256 over ``parts`` and their boundaries."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def prepare(split: Images, transforms: Transforms) -> Transformed | Preloaded:
    """The split as normalised float (3, img_size, img_size) images and int labels, as evaluated.

    Decoded once and held in memory where it fits (:data:`PRELOAD_BYTES`), else decoded when asked.
    """
    transformed = Transformed(split, transforms)
    fits = len(transformed) * 3 * transforms.img_size**2 <= PRELOAD_BYTES
    return Preloaded(transformed) if fits else transformed


def prepare_training(
    split: Images, transforms: Transforms, seed: int
) -> Transformed | Preloaded | Augmented:
    """The split as a training takes it: with random draws, if ``transforms`` makes any.

    Args:
        seed: of the draws.
    """
    if transforms.training is None:
        return prepare(split, transforms)
    return Augmented(split, transforms, seed)


class Transformed(Dataset[tuple[torch.Tensor, int]]):
    """A split decoded and transformed item by item, as in evaluation."""

    def __init__(self, split: Images, transforms: Transforms) -> None:
        self.split = decoded_for(split, transforms.least_side())
        self.transforms = transforms
        self._transform = transforms.for_evaluation()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels, label = self.pixels(index)
        return self.transforms.normalise(pixels), label

    def pixels(self, index: int) -> tuple[torch.Tensor, int]:
        """One image as uint8 (3, img_size, img_size), and its label."""
        image, label = self.split[index]
        return self._transform(image), int(label)


class Preloaded(Dataset[tuple[torch.Tensor, int]]):
    """A :class:`Transformed` split decoded once, by threads, and kept as uint8."""

    def __init__(self, transformed: Transformed) -> None:
        self._normalise = transformed.transforms.normalise
        size = transformed.transforms.img_size
        self.pixels = torch.empty(len(transformed), 3, size, size, dtype=torch.uint8)
        self.labels = [0] * len(transformed)

        def read(index: int) -> None:
            self.pixels[index], self.labels[index] = transformed.pixels(index)

        with ThreadPoolExecutor() as pool:
            # Exhausts the results, so that the first error is raised.
            deque(pool.map(read, range(len(transformed))), maxlen=0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._normalise(self.pixels[index]), self.labels[index]


class Draw(NamedTuple):
    """One use of an image in training.

    Attributes:
        image: its index in the split.
        epoch: from 1.
        repeat: how often the epoch has used the image before.
    """

    image: int
    epoch: int
    repeat: int


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """A split decoded and transformed at random.

    An item depends only on ``seed`` and the :class:`Draw` that asks for it, not on the process or
    on what came before. The global generators stay as they are.
    """

    def __init__(self, split: Images, transforms: Transforms, seed: int) -> None:
        self.split = decoded_for(split, transforms.least_side(training=True))
        self.seed = seed % 2**64  # seeds may be negative
        self._transform = transforms.for_training()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, int]:
        image, label = self.split[draw.image]
        with seeded((self.seed, draw.epoch, draw.image, draw.repeat)):
            return self._transform(image), int(label)


def decoded_for(split: Any, least_side: int | None) -> Any:
    """The split decoded at a smaller size, if it can be; None: in full."""
    if least_side is None or not isinstance(split, ReducibleImages):
        return split
    return split.reduced(least_side)
