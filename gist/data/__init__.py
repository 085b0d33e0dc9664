"""Images to train on: named data sets and image folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gist.data.base import (
    Augmented,
    DataError,
    Draw,
    ImageData,
    Preloaded,
    Transformed,
    prepare,
    prepare_training,
)
from gist.data.folder import load_folder
from gist.data.offline import SOURCES
from gist.data.transforms import PRESETS, Transforms
from gist_kernels.check import unknown_name

DATA_SETS: dict[str, Callable[[], ImageData]] = {n: s.load for n, s in SOURCES.items()}


def available_data() -> list[str]:
    """The names that :func:`load_data` accepts, besides folders."""
    return sorted(DATA_SETS)


def load_data(source: str, *, check: bool = True) -> ImageData:
    """Images by a data set's name or from a folder in ImageFolder layout.

    Args:
        source: a name of :func:`available_data`, or a folder for :func:`load_folder`. A folder
            with a data set's name needs ``./name``.
        check: open every image of a folder first.

    Raises:
        ValueError: neither a known name nor a folder.
        DataError: a folder's images can't be used as they are; it lists every fault found.
        ImportError: a data set's package is missing; the text names the extra that brings it.
    """
    if source in DATA_SETS:
        return DATA_SETS[source]()
    if Path(source).is_dir():
        return load_folder(Path(source), check=check)
    raise ValueError(
        unknown_name("data", source, DATA_SETS, hint=", or a folder with one sub-folder a class")
    )


__all__ = [
    "PRESETS",
    "Augmented",
    "DataError",
    "Draw",
    "ImageData",
    "Preloaded",
    "Transformed",
    "Transforms",
    "available_data",
    "load_data",
    "load_folder",
    "prepare",
    "prepare_training",
]
