"""Data sets that Hugging Face's ``datasets`` saved to a local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from gist.data.base import DataError, ImageData, Images, fingerprint
from gist.data.folder import status, unreadable
from gist.data.images import decode
from gist.data.split import Part, split_off_val, too_few_to_split

# Names of splits, each with the one it has here.
_SPLITS = {
    "train": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val",
    "test": "test",
}  # fmt: skip
LABELS = ("label", "labels")


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` wrote the folder."""
    if (folder / "dataset_dict.json").is_file():
        return True
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


class SavedImages(Dataset[tuple[Image.Image, int]]):
    """A saved split's images, decoded on access. A DataError names what can't be read.

    Args:
        rows: of a ``datasets.Dataset``; each has the encoded image in ``column``.
        labels: of the rows.
        name: of the split, for errors.
        least_side: as :func:`gist.data.images.decode` takes it.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        labels: Sequence[int],
        name: str,
        least_side: int | None = None,
    ) -> None:
        self.rows, self.column, self.labels, self.name = rows, column, labels, name
        self.least_side = least_side

    def reduced(self, least_side: int) -> SavedImages:
        return SavedImages(self.rows, self.column, self.labels, self.name, least_side)

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> bytes:
        """The image's file."""
        image = self.rows[index][self.column]
        content: bytes | None = image["bytes"]
        return Path(image["path"]).read_bytes() if content is None else content

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return decode(self.encoded(index), self.least_side), self.labels[index]
        except Exception as error:  # decoders of damaged files raise anything
            raise DataError(unreadable(Path(f"{self.name}, row {index}"), error)) from error


def load_saved_dataset(folder: Path, *, check: bool = True) -> ImageData:
    """Images of a folder that ``datasets.Dataset.save_to_disk`` or ``DatasetDict``'s wrote.

    The one column of type ``Image`` holds the images. The one of type ``ClassLabel`` holds the
    labels, or else the column ``label`` or ``labels``, whose sorted values are the classes. Splits
    are train, val (validation, valid, dev) and test. Without val, a fifth of each class is set
    apart for validation, the same in every run.

    Args:
        folder: where it was saved.
        check: as :func:`gist.data.load_folder` takes it.

    Raises:
        ImportError: ``datasets`` is missing.
        DataError: no such column or several, other splits, unreadable images: a line each.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{folder} was saved by Hugging Face's datasets, which is missing: pip install datasets"
        ) from error
    saved = datasets.load_from_disk(str(folder))
    parts = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    unknown = sorted(set(parts) - set(_SPLITS))
    if unknown or "train" not in parts:
        raise DataError(
            f"{folder} has the splits {', '.join(parts)}; train is needed, and those known are "
            f"{', '.join(_SPLITS)}"
        )
    image, label = _columns(parts["train"].features, datasets, folder)
    classes, labels = _labels(parts, label, datasets)
    splits: dict[str, Images] = {}
    faults: list[str] = []
    contents: list[bytes] = []
    for name, rows in parts.items():
        encoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        images = SavedImages(encoded, image, labels[name], f"{folder}, {name}")
        if _SPLITS[name] in splits:
            raise DataError(f"{folder} has two splits for {_SPLITS[name]}: {', '.join(parts)}")
        splits[_SPLITS[name]] = images
        contents += [name.encode(), repr(labels[name]).encode()]
        if check:
            digests, unread = _read_all(images)
            contents += digests
            faults += unread
        else:
            contents += [status(Path(file["filename"])) for file in rows.cache_files]
    if len(classes) < 2:
        faults.append(f"{folder} has {len(classes)} classes; at least 2 are needed")
    if "val" not in splits:
        faults += too_few_to_split(splits["train"].labels, classes)
        train, val = split_off_val(splits["train"].labels)
        splits |= {"train": Part(splits["train"], train), "val": Part(splits["train"], val)}
    if faults:
        raise DataError(f"{folder} can't be trained on:\n  " + "\n  ".join(faults))
    return ImageData(
        name=folder.resolve().name,
        classes=tuple(classes),
        train=splits["train"],
        val=splits["val"],
        test=splits.get("test"),
        fingerprint=("" if check else "unread-") + fingerprint(contents),
    )


def _columns(features: Mapping[str, Any], datasets: Any, folder: Path) -> tuple[str, str]:
    """The columns of images and of labels."""
    kinds = (("Image", datasets.Image), ("ClassLabel", datasets.ClassLabel))
    images, labels = ([n for n, f in features.items() if isinstance(f, kind)] for _, kind in kinds)
    labels = labels or [name for name in LABELS if name in features]
    for found, what in ((images, "type Image"), (labels, "type ClassLabel, or named label")):
        if len(found) != 1:
            raise DataError(
                f"{folder} needs one column of {what}; it has {len(found)}. Its columns are "
                + ", ".join(f"{name}: {type(f).__name__}" for name, f in features.items())
            )
    return images[0], labels[0]


def _labels(
    parts: Mapping[str, Any], column: str, datasets: Any
) -> tuple[list[str], dict[str, list[int]]]:
    """The classes' names, and each split's labels."""
    values = {name: list(rows[column]) for name, rows in parts.items()}
    feature = parts["train"].features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), values
    classes = sorted(set(values["train"]))
    number = {value: label for label, value in enumerate(classes)}
    # -1, which ImageData reports, where no training image has the class.
    known = {name: [number.get(v, -1) for v in of_split] for name, of_split in values.items()}
    return [str(value) for value in classes], known


def _read_all(images: SavedImages) -> tuple[list[bytes], list[str]]:
    """The SHA-256 of each image's file, and one line per image that can't be decoded."""
    small = images.reduced(1)  # decoded from all of its data, to few pixels

    def read(index: int) -> tuple[bytes, str | None]:
        try:
            small[index]
        except DataError as error:
            return b"", str(error)
        return hashlib.sha256(images.encoded(index)).digest(), None

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, range(len(images))))
    return [digest for digest, _ in results], [fault for _, fault in results if fault]
