"""Everything that a run's report shows, read from its folder, its data and its model."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from gist.data import DataError, ImageData, LabelledData, Transforms
from gist.data.base import Labelled, Transformed
from gist.model.saving import CONFIG_FILE
from gist.model.wrapped import GistModel
from gist.report.attention import UnavailableError, attention_maps
from gist.report.measures import Array, Calibration, ClassScores, confusion
from gist.report.pictures import MAP_SIDE, heat_map, thumbnail, to_image
from gist.runs.predictions import Predictions, paths_of
from gist.runs.run import finished_results, transforms_of
from gist.training.log import LOG_FILE

MISTAKES = 24
MAPS_OF_CLASSES, MAPS_OF_MISTAKES = 4, 2
TEXT_WIDTH = 160


@dataclass(frozen=True)
class Example:
    """An item and what was predicted for it.

    ``path`` is the start of a text. ``picture`` is an image's data URI, or None.
    """

    path: str
    true: str
    predicted: str
    probability: float
    gist_predicted: str | None
    picture: str | None = None


@dataclass(frozen=True)
class Map:
    """What both tokens attend to in an example: data URIs, and the shares that patches get."""

    example: Example
    cls: tuple[str, float] | None
    gist: tuple[str, float] | None


@dataclass(frozen=True)
class Collected:
    """What a report shows.

    Attributes:
        name: the run folder's.
        results: those of ``results.json``.
        classes: their names.
        log: columns of ``log.csv``, nan where a cell is empty.
        predictions: None where there are none. The next three are then None or empty too.
        matrix, scores, calibration: see :mod:`gist.report.measures`.
        mistakes: wrong predictions, the most probable first.
        maps: attention over some images.
        no_pictures, no_maps: why pictures or maps are missing, or None.
    """

    name: str
    results: dict[str, Any]
    classes: Sequence[str]
    log: dict[str, list[float]]
    predictions: Predictions | None = None
    matrix: Array | None = None
    scores: ClassScores | None = None
    calibration: Calibration | None = None
    mistakes: list[Example] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    no_pictures: str | None = None
    no_maps: str | None = None


def collect(
    directory: Path, model: GistModel | None = None, data: LabelledData | None = None
) -> Collected:
    """Read a finished run.

    Args:
        directory: the run's.
        model: the run's, for attention; left in evaluation mode. None leaves attention out.
        data: the run's, for pictures. None leaves pictures and attention out.

    Raises:
        FileNotFoundError: no finished run.
        ValueError: the files are not a run's.
    """
    results = finished_results(directory)
    saved = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    classes = saved.get("classes") or [str(label) for label in range(saved["num_classes"])]
    name, log = directory.resolve().name, read_log(directory)
    predictions = Predictions.read(directory, classes)
    if predictions is None:
        return Collected(name, results, classes, log)
    matrix = confusion(predictions.true, predictions.predicted, len(classes))
    split, no_pictures = _split_of(data, predictions)
    wrong = [int(i) for i in (~predictions.correct).nonzero()[0]]
    wrong.sort(key=lambda index: -predictions.probability[index])
    mistakes = [_example(predictions, index, split) for index in wrong[:MISTAKES]]
    maps: list[Map] = []
    no_maps = no_pictures
    if split is not None and not isinstance(data, ImageData):
        no_maps = "it is shown over images only"
    elif split is not None:
        try:
            chosen = _of_different_classes(predictions) + wrong[:MAPS_OF_MISTAKES]
            maps = _maps(predictions, chosen, split, transforms_of(directory), model)
        except UnavailableError as error:
            no_maps = str(error)
    return Collected(
        name,
        results,
        classes,
        log,
        predictions,
        matrix,
        ClassScores.of(matrix),
        Calibration.of(predictions.probability, predictions.correct),
        mistakes,
        maps,
        no_pictures,
        no_maps,
    )


def read_log(directory: Path) -> dict[str, list[float]]:
    """The columns of a run's log.csv; empty without one. An empty cell is nan."""
    path = directory / LOG_FILE
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = rows[0] if rows else {}
    return {name: [float(row[name] or math.nan) for row in rows] for name in names}


def _split_of(data: Any, predictions: Predictions) -> tuple[Labelled | None, str | None]:
    """The images or texts that were predicted; or None, and why they can't be shown."""
    if data is None:
        return None, "the run's data could not be read when this report was written"
    split = getattr(data, predictions.split, None)
    if not isinstance(data, LabelledData) or split is None:
        return None, "the run's data has no images"
    found, known = paths_of(split), predictions.paths
    same = len(found) == len(known) and list(split.labels) == predictions.true.tolist()
    # The paths in the file may be relative to the data's folder.
    if not same or not all(
        ours.endswith(theirs) for ours, theirs in zip(found, known, strict=True)
    ):
        return None, f"the run's data has other {data.item}s now than when they were predicted"
    return split, None


def _example(predictions: Predictions, index: int, split: Labelled | None) -> Example:
    gist, picture, path = predictions.gist_predicted, None, predictions.paths[index]
    if split is not None:
        with suppress(DataError):  # unreadable since: its name is shown
            item = split[index][0]
            if isinstance(item, str):
                path = shorten(item, TEXT_WIDTH, placeholder=" ...")
            else:
                picture = thumbnail(item)
    return Example(
        path,
        predictions.classes[predictions.true[index]],
        predictions.classes[predictions.predicted[index]],
        float(predictions.probability[index]),
        None if gist is None else predictions.classes[gist[index]],
        picture,
    )


def _of_different_classes(predictions: Predictions) -> list[int]:
    """The first correctly predicted images of a few classes, spread over all."""
    first: dict[int, int] = {}
    for index in predictions.correct.nonzero()[0].tolist():
        first.setdefault(int(predictions.true[index]), index)
    images = [first[label] for label in sorted(first)]
    count = min(MAPS_OF_CLASSES, len(images))
    return [images[i * len(images) // count] for i in range(count)]


def _maps(
    predictions: Predictions,
    indices: Sequence[int],
    split: Any,
    transforms: Transforms,
    model: GistModel | None,
) -> list[Map]:
    """The attention over some images, as the model sees them."""
    if model is None:
        raise UnavailableError("the run's model could not be loaded when this report was written")
    seen = Transformed(split, transforms)
    pixels = torch.stack([seen.pixels(index)[0] for index in indices])
    inputs = torch.stack([transforms.normalise(image) for image in pixels])
    found = attention_maps(model, inputs.to(next(model.parameters()).device))

    def of(weights: torch.Tensor | None, place: int) -> tuple[str, float] | None:
        if weights is None:
            return None
        picture = thumbnail(heat_map(pixels[place], weights[place]), MAP_SIDE)
        return picture, float(weights[place].sum())

    shown = []
    for place, index in enumerate(indices):
        picture = thumbnail(to_image(pixels[place]), MAP_SIDE)
        example = _example(predictions, index, None)
        example = Example(**{**vars(example), "picture": picture})
        shown.append(Map(example, of(found.cls, place), of(found.gist, place)))
    return shown
