"""A run's predictions, item by item: made as it is measured, kept in ``predictions.csv``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import Dataset

from gist.data.base import Labelled, LabelledData
from gist.data.folder import ImageFiles
from gist.data.split import Joined, Part
from gist.files import CsvTable, write_atomically
from gist.model.wrapped import GistModel
from gist.training.evaluation import (
    Evaluation,
    evaluate,
    evaluation_order,
    processes,
    share_of,
)

PREDICTIONS_FILE = "predictions.csv"
COLUMNS = (
    "split", "path", "true", "predicted", "probability", "gist_predicted", "gist_probability",
)  # fmt: skip
SPLIT_NAMES = {"test": "test", "val": "validation"}
_ENCODING: Mapping[str, str] = {"encoding": "utf-8", "errors": "surrogateescape"}


@dataclass(frozen=True)
class Predictions:
    """The most probable class of each image or text, in the order of the split.

    Attributes:
        split: "test" or "val".
        classes: their names.
        paths: each image's file, relative to the data's folder where it is below it; of images that
            are no files, and of texts, "#" and their index in the split.
        true, predicted: (N,) int64 indices into ``classes``; ``predicted`` is the class token's.
        probability: (N,) float64, the class token's softmax of ``predicted``.
        gist_predicted, gist_probability: the same of the Gist token; None without one.
    """

    split: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    true: np.ndarray[Any, Any]
    predicted: np.ndarray[Any, Any]
    probability: np.ndarray[Any, Any]
    gist_predicted: np.ndarray[Any, Any] | None = None
    gist_probability: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def correct(self) -> np.ndarray[Any, Any]:
        """(N,) bool: where the class token's prediction is the true class."""
        return self.true == self.predicted

    def write(self, directory: Path) -> None:
        """Write :data:`PREDICTIONS_FILE`, with :data:`COLUMNS` and classes by their names."""
        gist: list[tuple[str, str]] = [("", "")] * len(self)
        if self.gist_predicted is not None and self.gist_probability is not None:
            both = zip(self.gist_predicted, self.gist_probability, strict=True)
            gist = [(self.classes[label], f"{probability:.9g}") for label, probability in both]
        text = io.StringIO()
        table = CsvTable(text)
        table.row(*COLUMNS)
        rows = zip(self.paths, self.true, self.predicted, self.probability, gist, strict=True)
        for path, true, predicted, probability, of_gist in rows:
            names = self.classes[true], self.classes[predicted]
            table.row(self.split, path, *names, f"{probability:.9g}", *of_gist)
        write_atomically(directory / PREDICTIONS_FILE, text.getvalue().encode(**_ENCODING))

    @classmethod
    def read(cls, directory: Path, classes: Sequence[str]) -> Predictions | None:
        """What :meth:`write` wrote; None without a file.

        Raises:
            ValueError: another program's file, or classes that the run does not have.
        """
        path = directory / PREDICTIONS_FILE
        if not path.is_file():
            return None
        with path.open(newline="", **_ENCODING) as file:  # type: ignore[call-overload]
            rows = list(csv.DictReader(file))
        number = {name: label for label, name in enumerate(classes)}
        try:
            columns = {name: [row[name] for row in rows] for name in COLUMNS}
            (split,) = set(columns["split"])
            labels = {
                name: np.array([number[value] for value in columns[name]])
                for name in ("true", "predicted", "gist_predicted")
                if any(columns[name])
            }
            probabilities = {
                name: np.array(list(map(float, columns[name])))
                for name in ("probability", "gist_probability")
                if any(columns[name])
            }
            return cls(split, tuple(classes), tuple(columns["path"]), **labels, **probabilities)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold this run's predictions ({error!r}); delete it, and "
                "gist report writes it again"
            ) from error


class Recorded(nn.Module):
    """A model that keeps the most probable classes of both tokens for all images it is given.

    Its output is (B, C) logits of the class token, as the model gives in evaluation mode:
    :func:`gist.training.evaluation.evaluate` measures it like the model, in the same pass.
    """

    def __init__(self, model: GistModel) -> None:
        super().__init__()
        self.model = model
        self._kept: list[torch.Tensor] = []  # (tokens, 2, B) probabilities and classes, as floats

    @torch.no_grad()
    def forward(self, *images: torch.Tensor, **texts: torch.Tensor) -> torch.Tensor:
        was = self.model.training
        try:
            # The flag of the model only: it asks for both tokens, and no dropout reads it.
            self.model.training = self.model.token is not None
            output = self.model(*images, **texts)
        finally:
            self.model.training = was
        both = [output] if isinstance(output, torch.Tensor) else list(output)
        best = [logits.float().softmax(1).max(1) for logits in both]
        self._kept.append(torch.stack([torch.stack((p, c.to(p.dtype))) for p, c in best]))
        return both[0]

    def kept(self, count: int) -> np.ndarray[Any, Any]:
        """(tokens, 2, N) probabilities and classes of all processes' ``count`` images, in order."""
        tokens = 1 if self.model.token is None else 2
        own = torch.cat(self._kept, dim=2).cpu().numpy() if self._kept else np.empty((tokens, 2, 0))
        state = processes(next(self.model.parameters()).device)
        own = own[:, :, : len(share_of(count, state))]  # without evaluate's filler
        shares = gather_object([own.astype(np.float64)])
        kept = np.empty((tokens, 2, count))
        for rank, share in enumerate(shares):  # as evaluate shares images out
            kept[:, :, rank :: len(shares)] = share
        return kept


def measure(
    model: GistModel,
    name: str,
    split: Labelled,
    prepared: Dataset[Any],
    classes: Sequence[str],
    *,
    root: Path | None = None,
    workers: int = 0,
) -> tuple[Evaluation, Predictions]:
    """Evaluate a model and keep its predictions, in one pass over a split.

    Args:
        model: is left in evaluation mode.
        name: "test" or "val".
        split: the images or texts.
        prepared: the same, as the model takes them.
        classes: their names.
        root: the folder or table that names the images; paths are relative to its folder.
        workers: loader processes.

    Raises:
        ValueError: the split is empty.
    """
    recorded = Recorded(model)
    measured = evaluate(recorded, prepared, workers=workers)
    kept, order = recorded.kept(len(split)), evaluation_order(prepared)
    if order is not None:
        kept[:, :, order] = kept.copy()
    probability, predicted = zip(*kept, strict=True)
    gist = len(probability) > 1
    return measured, Predictions(
        name,
        tuple(classes),
        tuple(paths_of(split, root)),
        np.asarray(split.labels),
        predicted[0].astype(np.int64),
        probability[0],
        predicted[1].astype(np.int64) if gist else None,
        probability[1] if gist else None,
    )


def measure_run(
    model: GistModel,
    data: LabelledData,
    prepared: Dataset[Any] | None,
    source: str,
    workers: int = 0,
) -> tuple[Evaluation, Predictions]:
    """Evaluate a run's model on its test split, or on the validation split without any.

    Args:
        model: as trained.
        data: what it was trained on; has test or val.
        prepared: that split, as the model takes it.
        source: the run's ``config.data``, to which the images' paths are relative.
        workers: loader processes.
    """
    name, split = measured_split(data)
    assert prepared is not None
    return measure(model, name, split, prepared, data.classes, root=Path(source), workers=workers)


def measured_split(data: LabelledData) -> tuple[str, Labelled]:
    """The name of the split on which a run's predictions are made, and the split."""
    split = data.test if data.test is not None else data.val
    assert split is not None
    return ("test" if data.test is not None else "val"), split


def paths_of(split: Labelled, root: Path | None = None) -> list[str]:
    """Names of a split's items, see :class:`Predictions`."""
    folder = None if root is None else root if root.is_dir() else root.parent
    names = []
    for index, path in enumerate(_files(split)):
        if path is None:
            names.append(f"#{index}")
        elif folder is not None and path.is_relative_to(folder):
            names.append(os.fspath(path.relative_to(folder)))
        else:
            names.append(os.fspath(path))
    return names


def _files(split: Labelled) -> list[Path | None]:
    """Each image's file, within parts of splits too; None for an item that is no file."""
    if isinstance(split, ImageFiles):
        return [path for path, _ in split.samples]
    if isinstance(split, Part):
        files = _files(split.items)
        return [files[index] for index in split.indices]
    if isinstance(split, Joined):
        return [path for part in split.splits for path in _files(part)]
    return [None] * len(split)
