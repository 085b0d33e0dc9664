"""Write a task in VTAB-1K's layout, as lossless PNG files."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torchvision
from PIL import Image

from gist.data import ImageData
from gist.data.base import Images
from gist.data.images import to_rgb
from gist.data.split import Joined, distinct, pixel_digest, stratified
from gist.suites.vtab_layout import LISTS
from gist_kernels.check import unknown_name


def export(
    source: ImageData | tuple[Images, Images | None],
    out: Path,
    *,
    train: int = 800,
    val: int = 200,
    test: int | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Write ``out/{train800,val200,train800val200,test}.txt`` and ``out/images/<split>/*.png``.

    Classes keep their shares in each split. An image that occurs several times is written once,
    and not at all with two labels; one of the test set is never trained on.

    Args:
        source: an ImageData, whose train and val are pooled, or a pool and its fixed test set;
            without test set, the images that are left over test.
        out: made by this call, whole or not at all.
        train, val: images.
        test: images at most; None for all.
        seed: the seed of the split.

    Returns:
        Images by list.

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: too few images.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; nothing is overwritten")
    if isinstance(source, ImageData):
        splits = [split for split in (source.train, source.val) if split is not None]
        source = Joined(*splits), source.test
    pool, fixed = source
    everything = Joined(fixed, pool) if fixed is not None else pool
    before = len(fixed) if fixed is not None else 0
    digests = [pixel_digest(everything[i][0].convert("RGB")) for i in range(len(everything))]
    labels = [int(label) for label in everything.labels]
    kept = distinct(digests, labels)  # the test set comes first, so that it keeps its images
    mine = [i for i in kept if i >= before]
    counts: tuple[int | None, ...] = (train, val) if fixed is not None else (train, val, test)
    parts = _parts(mine, labels, counts, seed)
    if fixed is not None:
        left = [i for i in kept if i < before]
        parts += _parts(left, labels, (min(test or len(left), len(left)),), seed)
    lists = dict(zip(LISTS, (parts[0], parts[1], parts[0] + parts[1], parts[2]), strict=True))

    temporary = out.with_name(f".{out.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, indices in lists.items():
            folder = temporary / "images" / name
            folder.mkdir(parents=True)
            lines = []
            for number, index in enumerate(indices):
                image, label = everything[index]
                image.convert("RGB").save(folder / f"{number:06d}.png")
                lines.append(f"images/{name}/{number:06d}.png {label}\n")
            (temporary / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {name: len(indices) for name, indices in lists.items()}


def _parts(
    indices: Sequence[int], labels: Sequence[int], counts: Sequence[int | None], seed: int
) -> list[list[int]]:
    split = stratified([labels[i] for i in indices], counts, seed)
    return [[indices[i] for i in part] for part in split]


class _Torchvision:
    """A torchvision data set's RGB images and labels."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self.labels: Sequence[int] = _labels(data)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return to_rgb(self._data[index][0]), int(self.labels[index])


def _labels(data: Any) -> list[int]:
    for name in (
        "targets",
        "labels",
        "_labels",
        "y",
    ):  # the sets' names for labels that need no decoding
        found = getattr(data, name, None)
        if found is not None and len(found) == len(data):
            return [int(label) for label in found]
    return [int(data[i][1]) for i in range(len(data))]


def torchvision_data(name: str, root: Path) -> tuple[Images, Images | None]:
    """A torchvision data set below ``root``: the images to train on, and the test set.

    Nothing is downloaded. A set without splits of its own gives no test set.

    Raises:
        ValueError: torchvision has no data set of this name, or not for classification.
        RuntimeError: ``root`` lacks its files.
    """
    kind: Any = getattr(torchvision.datasets, name, None)
    if not isinstance(kind, type):
        known = [n for n in torchvision.datasets.__all__ if n[0].isupper()]
        raise ValueError(unknown_name("torchvision data set", name, known))
    parameters = inspect.signature(kind).parameters
    options = {"download": False} if "download" in parameters else {}
    splits: list[dict[str, Any]] = [{}]
    if "train" in parameters:
        splits = [{"train": True}, {"train": False}]
    elif "split" in parameters:
        first = parameters["split"].default  # "train" or, for pets, "trainval"
        splits = [{"split": first}, {"split": "test"}]
    read = [_Torchvision(kind(str(root), **options, **split)) for split in splits]
    return read[0], read[1] if len(read) > 1 else None
