"""The usual layout of VTAB-1K on disk, and loading a task from it.

ROOT/<task>/{train800,val200,train800val200,test}.txt    lines: images/train800/000000.jpg LABEL
ROOT/<task>/images/<split>/000000.jpg
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gist.data import DataError, ImageData, LabelledData
from gist.data.base import fingerprint
from gist.data.folder import ImageFiles, Sample
from gist.data.split import Joined
from gist.suites.tasks import Task

LISTS = ("train800", "val200", "train800val200", "test")


@dataclass(frozen=True)
class Stages:
    """A task's items for the two stages of a clean run; both know the whole task's fingerprint.

    Attributes:
        select: 800 to train, 200 to choose on, no test.
        final: all 1,000 to train, and the test images; no val.
    """

    select: LabelledData
    final: LabelledData


def read_list(file: Path, classes: int) -> tuple[list[Sample], list[str]]:
    """A list's images and labels, and one line per fault.

    A line is split at its last blank: paths may hold blanks. Images are not opened.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        return [], [f"{file}: {reason}"]
    samples, faults, seen = [], [], set[str]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        path, _, text = line.rstrip().rpartition(" ")
        if not path:
            faults.append(f"{where}: {line!r} is not an image's path, a blank and a label")
            continue
        if path in seen:
            faults.append(f"{where}: {path} is listed twice")
        seen.add(path)
        if not (text.isascii() and text.isdigit()):
            faults.append(f"{where}: the label of {path} is {text!r}, not an integer from 0")
        elif int(text) >= classes:
            faults.append(f"{where}: the label of {path} is {text}; it must be 0 to {classes - 1}")
        elif not (file.parent / path).is_file():
            faults.append(f"{where}: {file.parent / path} does not exist")
        else:
            samples.append((file.parent / path, int(text)))
    return samples, faults


def read_lists(root: Path, task: Task) -> tuple[dict[str, list[Sample]], list[str]]:
    """All four lists of a task, and their faults."""
    if not (root / task.name).is_dir():
        return {}, [f"{root / task.name}: no such folder"]
    assert task.classes is not None
    lists, faults = {}, []
    for name in LISTS:
        lists[name], found = read_list(root / task.name / f"{name}.txt", task.classes)
        faults += found
    return lists, faults


def load_task(root: Path, task: Task) -> Stages:
    """The images of one task, opened only on access.

    Raises:
        DataError: a list or an image that is missing, a label out of range: every one, a line each.
    """
    lists, faults = read_lists(root, task)
    faults += [f"{root / task.name / name}.txt: empty" for name in lists if not lists[name]]
    if faults:
        raise DataError(f"{task.name} can't be used:\n  " + "\n  ".join(faults))
    assert task.classes is not None
    common: dict[str, Any] = {
        "name": task.name,
        "classes": tuple(map(str, range(task.classes))),
        "fingerprint": task_fingerprint(lists, sha256),
        # 800 of SUN397's images do not show each of its 397 classes.
        "every_class_trained": False,
    }
    return Stages(
        ImageData(
            train=ImageFiles(lists["train800"]),
            val=ImageFiles(lists["val200"]),
            test=None,
            **common,
        ),
        ImageData(
            train=ImageFiles(lists["train800val200"]),
            val=None,
            test=ImageFiles(lists["test"]),
            **common,
        ),
    )


def task_fingerprint(
    lists: Mapping[str, Sequence[Sample]], content: Callable[[Path], bytes]
) -> str:
    """A fingerprint that changes with any image, label or list.

    ``content`` returns the SHA-256 of a file.
    """
    return fingerprint(
        part
        for name in LISTS
        for path, label in lists[name]
        for part in (f"{name} {label}".encode(), content(path))
    )


def sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def stages_of(data: LabelledData) -> Stages:
    """The two stages of a data set with all three splits.

    Raises:
        DataError: it has no validation or no test items.
    """
    if data.val is None or data.test is None:
        missing = "validation" if data.val is None else "test"
        raise DataError(f"{data.name} has no {missing} {data.item}s")
    return Stages(
        select=replace(data, test=None),
        final=replace(data, train=Joined(data.train, data.val), val=None),
    )
