"""Image folders: one sub-folder per class, in splits or to be split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from gist.data.base import DataError, ImageData, fingerprint

SPLITS = ("train", "val", "test")
VAL_SHARE = 0.2
Sample = tuple[Path, int]


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files with their labels, decoded on access by ``read``."""

    def __init__(
        self, samples: Sequence[Sample], read: Callable[[Path], Image.Image] | None = None
    ) -> None:
        self.samples, self._read = samples, read or read_image

    @property
    def labels(self) -> list[int]:
        return [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return self._read(path), label


def read_image(path: Path) -> Image.Image:
    """An image file as RGB, turned upright as its EXIF orientation says.

    16-bit grey levels are scaled to 8 bits. Levels without a fixed range are refused.
    """
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F"):
            raise ValueError(f"mode {upright.mode} has no fixed range; save it with 8 or 16 bits")
        if upright.mode.startswith("I;16"):
            # PIL would clip, not scale: every level above 255 of 65535 would turn white.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")


def load_folder(root: Path, *, check: bool = True) -> ImageData:
    """Images under ``root`` in torchvision's ImageFolder layout.

    ``root/train/CLASS/*`` with ``root/val/CLASS/*`` and ``root/test/CLASS/*`` if they are there;
    or ``root/CLASS/*``. Without a val folder, a fifth of each class is set apart for validation,
    the same in every run. Files without an image's suffix, and hidden ones, are skipped.

    Args:
        root: the folder.
        check: decode every image first. False finds only what the folders show.

    Raises:
        DataError: unreadable images, empty class folders, classes that differ between splits, fewer
            than two classes, too few images to split: all that was found, a line each.
    """
    in_splits = (root / "train").is_dir()
    if not in_splits and any((root / split).is_dir() for split in SPLITS):
        raise DataError(f"{root} has a val or test folder but no train folder")
    folders = {s: root / s for s in SPLITS if (root / s).is_dir()} if in_splits else {"train": root}

    faults: list[str] = []
    classes = _class_names(folders["train"])
    if len(classes) < 2:
        faults.append(f"{folders['train']} has {len(classes)} class folders; at least 2 are needed")
    samples: dict[str, list[Sample]] = {}
    for split, folder in folders.items():
        names = _class_names(folder)
        faults += [f"{folder / n}: no such class in {folders['train']}" for n in names - classes]
        faults += [f"{folder} lacks the class folder {n!r}" for n in classes - names]
        samples[split] = []
        for label, name in enumerate(sorted(classes)):
            files = image_files(folder / name)
            if not files and name in names:
                faults.append(f"{folder / name} has no image")
            samples[split] += [(file, label) for file in files]
    if "val" not in samples:
        faults += _split_off_val(samples, sorted(classes))
    if check:
        faults += _unreadable([path for split in samples.values() for path, _ in split])
    if faults:
        raise DataError(f"{root} can't be trained on:\n  " + "\n  ".join(sorted(faults)))
    return ImageData(
        name=root.resolve().name,
        classes=tuple(sorted(classes)),
        train=ImageFiles(samples["train"]),
        val=ImageFiles(samples["val"]),
        test=ImageFiles(samples["test"]) if "test" in samples else None,
        fingerprint=fingerprint(_identities(samples)),
    )


def _class_names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}


def image_files(folder: Path) -> list[Path]:
    """The image files in and below a folder by their suffixes, without hidden ones, sorted."""
    return sorted(
        path
        for path in (folder.rglob("*") if folder.is_dir() else ())
        if path.suffix.lower() in IMG_EXTENSIONS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _split_off_val(samples: dict[str, list[Sample]], classes: Sequence[str]) -> list[str]:
    """Move a fifth of each class from train to val; returns the classes too small for that."""
    random, faults = np.random.default_rng(0), []
    by_class: dict[int, list[Sample]] = {}
    for sample in samples["train"]:
        by_class.setdefault(sample[1], []).append(sample)
    train: list[Sample] = []
    samples["val"] = []
    for label, of_class in by_class.items():
        if len(of_class) == 1:
            faults.append(
                f"class {classes[label]!r} has one image; two are needed to set one apart for val"
            )
        count = max(1, round(VAL_SHARE * len(of_class)))
        chosen = set(random.permutation(len(of_class))[:count].tolist())
        for index, sample in enumerate(of_class):
            (samples["val"] if index in chosen else train).append(sample)
    samples["train"] = train
    return faults


def _identities(samples: Mapping[str, Sequence[Sample]]) -> Iterator[bytes]:
    """The parts of the fingerprint."""
    for split, of_split in samples.items():
        for path, label in of_split:
            yield f"{split} {label} {path.name}".encode()
            yield path.read_bytes()


def _unreadable(paths: Sequence[Path]) -> list[str]:
    """One line, with the reason, per file that can't be decoded."""

    def fault(path: Path) -> str | None:
        try:
            read_image(path)
        except Exception as error:  # decoders of damaged files raise anything
            return f"{path} can't be read: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        return [found for found in pool.map(fault, paths) if found]
