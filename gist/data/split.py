"""Random splits of images: the same in every run, and with no image in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np
from PIL import Image

SEED = 2312_07255  # for the data sets' splits; independent of a training's seed


def pixel_digest(image: Image.Image) -> bytes:
    """SHA-256 of an image's size and pixels, however it was saved."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()


def distinct(contents: Sequence[Hashable], labels: Sequence[int]) -> list[int]:
    """Indices of the first image of each content, without contents that have two labels."""
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
