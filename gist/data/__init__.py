"""Images and texts to train on: named data sets, folders, tables, and saved ``datasets``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gist.data.base import (
    Augmented,
    DataError,
    Draw,
    ImageData,
    LabelledData,
    Preloaded,
    Transformed,
    prepare,
    prepare_training,
)
from gist.data.folder import load_folder
from gist.data.folds import folds
from gist.data.hf_dataset import is_saved_dataset, load_saved_dataset
from gist.data.offline import SOURCES
from gist.data.offline_text import TEXT_SOURCES
from gist.data.table import SUFFIXES, load_table
from gist.data.text import TEXT_SUFFIXES, TextData, Texts, Tokenised, read_texts
from gist.data.transforms import PRESETS, Transforms
from gist_kernels.check import unknown_name

DATA_SETS: dict[str, Callable[[], ImageData]] = {n: s.load for n, s in SOURCES.items()}


def available_data() -> list[str]:
    """The names that :func:`load_data` accepts, besides folders."""
    return sorted(DATA_SETS)


def load_data(source: str, *, check: bool = True) -> ImageData:
    """Images by a data set's name, or from files.

    Args:
        source: a name of :func:`available_data`; a folder for :func:`load_folder`; a CSV or JSONL
            file for :func:`load_table`; or a folder for :func:`load_saved_dataset`. A folder with a
            data set's name needs ``./name``.
        check: open every image of files first.

    Raises:
        ValueError: neither a known name nor a folder or a table.
        FileNotFoundError: there is no such table.
        DataError: the images can't be used as they are; it lists every fault found.
        ImportError: a data set's package is missing; the text names the extra that brings it.
    """
    if source in DATA_SETS:
        return DATA_SETS[source]()
    path = Path(source)
    if path.is_dir():
        load = load_saved_dataset if is_saved_dataset(path) else load_folder
        return load(path, check=check)
    if path.suffix.lower() in SUFFIXES:
        return load_table(path, check=check)
    hint = ", or a folder with one sub-folder a class, or a .csv or .jsonl file"
    raise ValueError(unknown_name("data", source, DATA_SETS, hint=hint))


def available_texts() -> list[str]:
    """The names that :func:`load_texts` accepts, besides files."""
    return sorted(TEXT_SOURCES)


def load_texts(source: str) -> TextData:
    """Texts by a data set's name, or from files.

    Args:
        source: a name of :func:`available_texts`, or a table or folder for :func:`read_texts`. A
            folder with a data set's name needs ``./name``.

    Raises:
        ValueError: neither a known name nor a folder or a table.
        FileNotFoundError: there is no such table.
        DataError: the texts can't be used as they are; it lists every fault found.
        ImportError: a data set's package is missing; the text says how to get it.
    """
    if source in TEXT_SOURCES:
        return TEXT_SOURCES[source].load()
    path = Path(source)
    if path.is_dir() or path.suffix.lower() in TEXT_SUFFIXES:
        return read_texts(path)
    hint = f", or a {', '.join(TEXT_SUFFIXES)} file, or a folder of them"
    raise ValueError(unknown_name("text", source, TEXT_SOURCES, hint=hint))


__all__ = [
    "PRESETS",
    "Augmented",
    "DataError",
    "Draw",
    "ImageData",
    "LabelledData",
    "Preloaded",
    "TextData",
    "Texts",
    "Tokenised",
    "Transformed",
    "Transforms",
    "available_data",
    "available_texts",
    "folds",
    "load_data",
    "load_folder",
    "load_saved_dataset",
    "load_table",
    "load_texts",
    "prepare",
    "prepare_training",
    "read_texts",
]
