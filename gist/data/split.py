"""Random splits of items: the same in every run, and with no item in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

from gist.data.base import Labelled, decoded_for

SEED = 2312_07255  # for the data sets' splits; independent of a training's seed
VAL_SHARE = 0.2


class Joined(Dataset[tuple[Any, int]]):
    """Two or more splits, one after the other."""

    def __init__(self, *splits: Labelled) -> None:
        self.splits = splits
        self._all: Dataset[Any] = ConcatDataset(cast(Iterable[Dataset[Any]], splits))
        self.labels = [label for split in splits for label in split.labels]

    def reduced(self, least_side: int) -> Joined:
        return Joined(*(decoded_for(split, least_side) for split in self.splits))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._all[index]


class Part(Dataset[tuple[Any, int]]):
    """Some items of a split, by their indices."""

    def __init__(self, items: Labelled, indices: Sequence[int]) -> None:
        self.items, self.indices = items, indices
        labels = items.labels
        self.labels = [int(labels[i]) for i in indices]

    def reduced(self, least_side: int) -> Part:
        return Part(decoded_for(self.items, least_side), self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.items[self.indices[index]]


def split_off_val(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices to train on, and a fifth of each class, at least one item, for validation."""
    random = np.random.default_rng(0)
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    train: list[int] = []
    val: list[int] = []
    for of_class in by_class.values():
        count = max(1, round(VAL_SHARE * len(of_class)))
        chosen = set(random.permutation(len(of_class))[:count].tolist())
        for place, index in enumerate(of_class):
            (val if place in chosen else train).append(index)
    return train, val


def too_few_to_split(
    labels: Sequence[int], classes: Sequence[str], item: str = "image"
) -> list[str]:
    """A line per class with one item, which :func:`split_off_val` leaves none to train on."""
    return [
        f"class {classes[label]!r} has one {item}; two are needed to set one apart for val"
        for label, count in Counter(labels).items()
        if count == 1
    ]


def pixel_digest(image: Image.Image) -> bytes:
    """SHA-256 of an image's size and pixels, however it was saved."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()


def distinct(contents: Sequence[Hashable], labels: Sequence[int]) -> list[int]:
    """Indices of the first item of each content, without contents that have two labels."""
    label_of: dict[Hashable, set[int]] = {}
    for content, label in zip(contents, labels, strict=True):
        label_of.setdefault(content, set()).add(label)
    kept, seen = [], set()
    for index, content in enumerate(contents):
        if content not in seen and len(label_of[content]) == 1:
            kept.append(index)
        seen.add(content)
    return kept


def stratified(
    labels: Sequence[int], counts: Sequence[int | None], seed: int = SEED
) -> list[list[int]]:
    """Disjoint random indices in which each class has its share, up to rounding.

    Args:
        labels: of all images.
        counts: images of each split; None, for the last: all that are left.

    Raises:
        ValueError: fewer images than asked for.
    """
    needed = sum(count or 1 for count in counts)
    if len(labels) < needed:
        raise ValueError(f"{len(labels):,} images are too few for {needed:,}")
    random, array = np.random.default_rng(seed), np.asarray(labels)
    # Each image's place within its class, in (0, 1): sorted by it, any stretch is stratified.
    place = np.empty(len(array))
    for label in np.unique(array):
        members = random.permutation(np.flatnonzero(array == label))
        place[members] = (np.arange(len(members)) + random.random()) / len(members)
    order = np.argsort(place, kind="stable").tolist()
    splits, start = [], 0
    for count in counts:
        end = len(order) if count is None else start + count
        splits.append(order[start:end])
        start = end
    return splits
