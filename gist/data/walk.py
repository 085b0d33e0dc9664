"""Image files in and below a folder, through links."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from gist.data.images import image_suffixes


@dataclass
class Found:
    """The content of a folder, without hidden files.

    Attributes:
        images: files with an image's suffix, sorted.
        passed_over: other files, and links to a folder above themselves.
        faults: folders that can't be listed, and links to nothing; a line each.
    """

    images: list[Path] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def find_images(folder: Path, *, below: Path | None = None) -> Found:
    """The image files in and below a folder, chosen by suffix.

    Linked files and folders are followed. A link to a folder above itself is not: it would never
    end. A folder linked twice is taken twice.

    Args:
        folder: where to look. A missing one has no images.
        below: the folder through which ``folder`` was reached.
    """
    found = Found()
    if os.path.isdir(folder):
        above = () if below is None else (os.path.realpath(below),)
        _walk(folder, above, image_suffixes(), found)
    found.images.sort()
    found.passed_over.sort()
    return found


def _walk(folder: Path, above: tuple[str, ...], suffixes: frozenset[str], found: Found) -> None:
    real = os.path.realpath(folder)
    if any(_contains(real, other) for other in above):
        found.passed_over.append(folder)
        return
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError as error:
        found.faults.append(f"{folder} can't be listed: {error.strerror}")
        return
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            _walk(path, (*above, real), suffixes, found)
        elif path.suffix.lower() not in suffixes:
            found.passed_over.append(path)
        elif os.path.isfile(path):
            found.images.append(path)
        else:
            reason = "is a link to nothing" if path.is_symlink() else "is no regular file"
            found.faults.append(f"{path} can't be read: it {reason}")


def _contains(folder: str, other: str) -> bool:
    """Whether ``other`` is ``folder`` or below it; both are real paths."""
    return other == folder or other.startswith(folder.rstrip(os.sep) + os.sep)
