"""Image folders: one sub-folder per class, in splits or to be split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from gist.data.base import DataError, ImageData, fingerprint
from gist.data.images import decode, image_suffixes, read_image
from gist.data.split import split_off_val, too_few_to_split
from gist.data.walk import find_images

SPLITS = ("train", "val", "test")
# What other tools call splits. A model that tells these apart is never meant.
_SPLITS_ELSEWHERE = {*SPLITS, "training", "valid", "validation", "dev", "eval", "testing"}
Sample = tuple[Path, int]


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files with their labels, decoded on access. A DataError names what can't be read.

    Args:
        samples: paths and labels.
        least_side: as :func:`gist.data.images.decode` takes it.
    """

    def __init__(self, samples: Sequence[Sample], least_side: int | None = None) -> None:
        self.samples, self.least_side = samples, least_side

    def reduced(self, least_side: int) -> ImageFiles:
        """The same files, of which large JPEGs are decoded at a smaller size."""
        return ImageFiles(self.samples, least_side)

    @property
    def labels(self) -> list[int]:
        return [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            return read_image(path, self.least_side), label
        except Exception as error:  # decoders of damaged files raise anything
            raise DataError(unreadable(path, error)) from error


def unreadable(path: Path, error: Exception) -> str:
    """The line that names a file that can't be read, and the reason."""
    return f"{path} can't be read: {error or type(error).__name__}"


def load_folder(root: Path, *, check: bool = True) -> ImageData:
    """Images under ``root`` in torchvision's ImageFolder layout.

    ``root/train/CLASS/*`` with ``root/val/CLASS/*`` and ``root/test/CLASS/*`` if they are there;
    or ``root/CLASS/*``. Without a val folder, a fifth of each class is set apart for validation,
    the same in every run. Links to files and folders are followed. Hidden files are skipped. Every
    other file without a suffix of :func:`gist.data.images.image_suffixes` is listed in
    ``passed_over`` of the result. So are images beside the class folders, and folders beside the
    splits.

    Args:
        root: the folder.
        check: decode every image first, and include its content in the fingerprint. False opens
            no file: it finds only what the folders show, and the fingerprint is that of the files'
            names, sizes and times of modification.

    Raises:
        DataError: unreadable images, empty class folders, classes that differ between splits, fewer
            than two classes, too few images to split: all that was found, a line each. Before
            that, folders of splits by other names, such as ``Train`` and ``validation``.
    """
    in_splits = (root / "train").is_dir()
    if not in_splits and any((root / split).is_dir() for split in SPLITS):
        raise DataError(f"{root} has a val or test folder but no train folder")
    folders = {s: root / s for s in SPLITS if (root / s).is_dir()} if in_splits else {"train": root}

    faults: list[str] = []
    passed_over = _beside(root, folders)
    classes = _class_names(folders["train"])
    if classes and {name.lower() for name in classes} <= _SPLITS_ELSEWHERE:
        raise DataError(
            f"{folders['train']} has the folders {', '.join(sorted(classes))}, which are no "
            f"classes; name splits {', '.join(SPLITS)}"
        )
    if len(classes) < 2:
        faults.append(f"{folders['train']} has {len(classes)} class folders; at least 2 are needed")
    samples: dict[str, list[Sample]] = {}
    for split, folder in folders.items():
        names = _class_names(folder)
        faults += [f"{folder / n}: no such class in {folders['train']}" for n in names - classes]
        faults += [f"{folder} lacks the class folder {n!r}" for n in classes - names]
        samples[split] = []
        for label, name in enumerate(sorted(classes)):
            found = find_images(folder / name, below=folder)
            if not found.images and name in names:
                faults.append(f"{folder / name} has no image")
            samples[split] += [(file, label) for file in found.images]
            passed_over += found.passed_over
            faults += found.faults
    return data_of_files(root, sorted(classes), samples, faults, passed_over, check=check)


def data_of_files(
    source: Path,
    classes: Sequence[str],
    samples: dict[str, list[Sample]],
    faults: Sequence[str],
    passed_over: Sequence[Path] = (),
    *,
    check: bool,
) -> ImageData:
    """Image files of known classes and splits.

    Args:
        source: the folder or table that names them.
        samples: of each split; without "val", a fifth of each class in "train" is set apart.
        faults: found so far, a line each.
        check: as :func:`load_folder` takes it.

    Raises:
        DataError: ``faults``, and those found here.
    """
    faults = list(faults)
    if "val" not in samples:
        labels = [label for _, label in samples["train"]]
        faults += too_few_to_split(labels, classes)
        train, val = split_off_val(labels)
        of_train = samples["train"]
        samples = {**samples, "train": [of_train[i] for i in train]}
        samples["val"] = [of_train[i] for i in val]
    paths = [path for split in samples.values() for path, _ in split]
    digests: list[bytes] = []
    if check:
        digests, unread = _read_all(paths)
        faults += unread
    if faults:
        raise DataError(f"{source} can't be trained on:\n  " + "\n  ".join(sorted(faults)))
    return ImageData(
        name=source.resolve().stem if source.is_file() else source.resolve().name,
        classes=tuple(classes),
        train=ImageFiles(samples["train"]),
        val=ImageFiles(samples["val"]),
        test=ImageFiles(samples["test"]) if "test" in samples else None,
        fingerprint=_fingerprint(samples, digests),
        passed_over=tuple(passed_over),
    )


def _class_names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}


def _beside(root: Path, folders: Mapping[str, Path]) -> list[Path]:
    """Images beside class folders and, where there are splits, folders beside the splits."""
    suffixes = image_suffixes()
    beside = [p for folder in folders.values() for p in folder.iterdir() if not p.is_dir()]
    found = [p for p in beside if p.suffix.lower() in suffixes]
    if root not in folders.values():
        found += [root / name for name in _class_names(root) - set(SPLITS)]
    return sorted(p for p in found if not p.name.startswith("."))


def _fingerprint(samples: Mapping[str, Sequence[Sample]], digests: Sequence[bytes]) -> str:
    """The fingerprint of images in splits, by their content if ``digests`` has it."""
    listed = [(split, *sample) for split, of_split in samples.items() for sample in of_split]
    contents = digests or [status(path) for _, path, _ in listed]
    # Names as the file system has them: they need not be UTF-8.
    identities: Iterator[bytes] = (
        part
        for (split, path, label), content in zip(listed, contents, strict=True)
        for part in (f"{split} {label} ".encode() + os.fsencode(path.name), content)
    )
    return ("" if digests else "unread-") + fingerprint(identities)


def status(path: Path) -> bytes:
    """A file's size and time of modification, which stand for its content."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}".encode()


def _read_all(paths: Sequence[Path]) -> tuple[list[bytes], list[str]]:
    """The SHA-256 of each file, and one line, with the reason, per file that can't be decoded."""

    def read(path: Path) -> tuple[bytes, str | None]:
        try:
            data = path.read_bytes()
            decode(data, least_side=1)  # reads all of a JPEG's data, and computes few pixels
        except Exception as error:  # decoders of damaged files raise anything
            return b"", unreadable(path, error)
        return hashlib.sha256(data).digest(), None

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, paths))
    return [digest for digest, _ in results], [fault for _, fault in results if fault]
