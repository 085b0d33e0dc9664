"""Check a VTAB-1K tree, and name the file of every fault."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from gist.data.folder import Sample
from gist.data.images import decode
from gist.data.split import pixel_digest
from gist.suites.tasks import Task
from gist.suites.vtab_layout import LISTS, read_lists, task_fingerprint

COUNTS = {"train800": 800, "val200": 200, "train800val200": 1000}
SPLITS = ("train800", "val200", "test")  # must be disjoint


@dataclass
class TaskCheck:
    """The result of checking one task.

    Attributes:
        images: listed, by list.
        faults: a line each, with the file's name.
        warnings: what may be meant, but costs accuracy or makes results optimistic.
        fingerprint: changes with any image, label or list; as a run of the task records it. Empty
            where a list or an image could not be read.
    """

    task: str
    images: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fingerprint: str = ""


@dataclass(frozen=True)
class _File:
    digest: bytes  # of the decoded pixels, because one image may be saved in several ways
    format: str | None
    content: bytes  # SHA-256 of the file
    fault: str | None = None


def check(
    root: Path,
    task: Task,
    *,
    allow_duplicates: bool = False,
    counts: Mapping[str, int] = COUNTS,
) -> TaskCheck:
    """Read every list and decode every image of one task.

    Checked: the layout, 800 / 200 / 1,000 images, labels in range, images that can't be decoded, an
    image (by its pixels) in two of train800, val200 and test, and that train800val200 is the union
    of train800 and val200.

    Args:
        root: has a folder for each task.
        allow_duplicates: duplicates across splits are warnings. Some tasks' source data have them.
        counts: images expected by list.
    """
    result = TaskCheck(task.name)
    lists, result.faults = read_lists(root, task)
    if not lists:
        return result
    folder = root / task.name
    result.images = {name: len(samples) for name, samples in lists.items()}
    unread = bool(result.faults)
    for name in LISTS:
        found, expected = len(lists[name]), counts.get(name)
        if expected is not None and found != expected and (folder / f"{name}.txt").is_file():
            result.faults.append(
                f"{folder / name}.txt has {found:,} usable images; expected {expected:,}"
            )
        elif not found and (folder / f"{name}.txt").is_file():
            result.faults.append(f"{folder / name}.txt has no usable image")

    paths = list(dict.fromkeys(path for samples in lists.values() for path, _ in samples))
    with ThreadPoolExecutor() as pool:
        files = dict(zip(paths, pool.map(_inspect, paths), strict=True))
    broken = [f"{path} can't be read: {file.fault}" for path, file in files.items() if file.fault]
    result.faults += broken
    readable = {
        name: [(p, label) for p, label in samples if not files[p].fault]
        for name, samples in lists.items()
    }
    duplicates = list(_duplicates(readable, files))
    (result.warnings if allow_duplicates else result.faults).extend(duplicates)
    result.faults += _not_the_union(readable, files, folder)
    result.warnings += _jpeg(task, files)
    if not broken and not unread:
        result.fingerprint = task_fingerprint(lists, lambda path: files[path].content)
    return result


def _inspect(path: Path) -> _File:
    try:
        data = path.read_bytes()
        image = decode(data)
    except Exception as error:  # decoders of damaged files raise anything
        return _File(b"", None, b"", str(error) or type(error).__name__)
    return _File(pixel_digest(image), image.format, hashlib.sha256(data).digest())


def _duplicates(
    lists: Mapping[str, Iterable[Sample]], files: Mapping[Path, _File]
) -> Iterable[str]:
    for first, second in combinations(SPLITS, 2):
        where = {files[path].digest: path for path, _ in lists[first]}
        for path, _ in lists[second]:
            if files[path].digest in where:
                yield (
                    f"{path} of {second} is the same image as {where[files[path].digest]} "
                    f"of {first}"
                )


def _not_the_union(
    lists: Mapping[str, Iterable[Sample]], files: Mapping[Path, _File], folder: Path
) -> Iterable[str]:
    """Images, with labels, that train800val200 lacks or has too many of."""
    parts = [*lists["train800"], *lists["val200"]]
    for there, here, text in (
        (parts, lists["train800val200"], "lacks"),
        (lists["train800val200"], parts, "has, unlike train800 and val200,"),
    ):
        left = Counter((files[path].digest, label) for path, label in here)
        for path, label in there:
            left[files[path].digest, label] -= 1
            if left[files[path].digest, label] < 0:
                yield f"{folder / 'train800val200'}.txt {text} {path} with label {label}"


def _jpeg(task: Task, files: Mapping[Path, _File]) -> list[str]:
    lossy = [path for path, file in files.items() if file.format == "JPEG"]
    if task.name != "cifar" or not lossy:
        return []
    return [
        f"{lossy[0]} and {len(lossy) - 1:,} others are JPEG, which costs CIFAR's 32 x 32 images "
        "accuracy (70 instead of 80 % is reported); export them as PNG (gist vtab export)"
    ]
