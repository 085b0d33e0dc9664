"""Cross-validation: each item tests once, and trains in all other folds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TypeVar

from gist.data.base import DataError, LabelledData, fingerprint
from gist.data.split import Joined, Part, stratified
from gist.validate import check_count

Data = TypeVar("Data", bound=LabelledData)


def folds(data: Data, count: int) -> list[Data]:
    """``count`` data sets, of which each tests on another part of the images, or texts.

    The items are those of train and val together. Each class keeps its share in each fold. The
    folds are the same in every run. There is no val, so that no epoch is chosen by the items that
    test. ``data.test`` takes no part.

    Args:
        data: an ``ImageData`` or a ``TextData``.
        count: folds, at least 2.

    Raises:
        ValueError: ``count`` is not an integer of at least 2.
        DataError: a class has fewer items than there are folds.
    """
    check_count("folds", count, at_least=2)
    items = data.train if data.val is None else Joined(data.train, data.val)
    labels = list(items.labels)
    of_class = Counter(labels)
    faults = [
        f"class {name!r} has {of_class[label]} {data.item}s"
        for label, name in enumerate(data.classes)
        if of_class[label] < count
    ]
    if faults:
        raise DataError(
            f"{data.name} has fewer {data.item}s of a class than the {count} folds:\n  "
            + "\n  ".join(faults)
        )
    sizes = [len(labels) // count + (fold < len(labels) % count) for fold in range(count)]
    parts = stratified(labels, sizes)
    return [
        replace(
            data,
            name=f"{data.name}, fold {number} of {count}",
            train=Part(items, sorted(i for other in parts if other is not part for i in other)),
            val=None,
            test=Part(items, sorted(part)),
            fingerprint=fingerprint([data.fingerprint.encode(), f"{number}/{count}".encode()]),
        )
        for number, part in enumerate(parts, start=1)
    ]
