"""What a run's model takes: the splits of its data, prepared, and what is recorded of that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset

from gist.data import LabelledData
from gist.validate import check_choice

BALANCES = ("uniform", "balanced")


@dataclass(frozen=True)
class Prepared:
    """A run's data as its model's input.

    Attributes:
        train, val: as :func:`gist.training.loop.fit` takes them.
        test: makes the test split, once training has ended; None without one.
        recorded: of the preparation, for results.json.
        notes: what a person should know of it, a line each.
    """

    train: Dataset[Any]
    val: Dataset[Any] | None
    test: Callable[[], Dataset[Any]] | None
    recorded: Mapping[str, Any]
    notes: Sequence[str] = field(default_factory=tuple)


def check_balances(sampling: str, class_weights: str) -> None:
    """Raise a ValueError for an unknown word, or where both balance the classes."""
    check_choice("sampling", sampling, BALANCES)
    check_choice("class_weights", class_weights, BALANCES)
    if sampling == class_weights == "balanced":
        raise ValueError("sampling and class_weights both balance the classes; choose one")


def balanced_weights(labels: Sequence[int]) -> list[float]:
    """Weights by which each class that occurs is drawn equally often."""
    items = Counter(labels)
    return [1 / items[label] for label in labels]


def balanced_class_weights(labels: Sequence[int], classes: int) -> list[float]:
    """Weights by which each class counts as much as any other; their mean over items is 1.

    A class without an item has the weight of a class with one.
    """
    items = Counter(labels)
    return [len(labels) / (len(items) * max(1, items[label])) for label in range(classes)]


def split_sizes(data: LabelledData) -> dict[str, int]:
    """Items of each split that is there."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return {name: len(split) for name, split in splits.items() if split is not None}
